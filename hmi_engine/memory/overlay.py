"""Windows computed in traffic, kept in bounded memory beside the PLOT."""

from __future__ import annotations

import torch

import hmi_kernels

__all__ = ["OVERLAY_TABLES", "WindowOverlay"]

OVERLAY_TABLES = 2
"""How many kernel tables an overlay is: the young and the old generation."""


class WindowOverlay:
    """Rows of recently computed windows, in two generations of equal size.

    New rows go to the young generation; when it is full, the old one is emptied and the two change places.
    So at least half of the capacity is the most recent rows, an insertion never moves a row, and a row that
    was found stays where it is until the next call of :meth:`reserve`. Rows have the type of the PLOT's own
    rows, so that an output does not depend on which of the two holds a window.
    """

    def __init__(self, capacity_bytes: int, window: int, hidden_size: int, dtype: torch.dtype) -> None:
        """Reserves address space for ``capacity_bytes``; the operating system gives pages as rows arrive."""
        row_bytes = window * hidden_size * dtype.itemsize
        self.rows_per_generation = max(1, capacity_bytes // (OVERLAY_TABLES * row_bytes))
        shape = (self.rows_per_generation, window, hidden_size)
        self.row_tables = [torch.empty(shape, dtype=dtype) for _ in range(OVERLAY_TABLES)]
        self.indexes = [self._empty_index() for _ in range(OVERLAY_TABLES)]
        self._used = [0] * OVERLAY_TABLES
        self._young = 0

    def _empty_index(self) -> torch.Tensor:
        # Load factor at most one half: open addressing stays at one or two probes.
        slots = 1 << (2 * self.rows_per_generation - 1).bit_length()
        return torch.zeros(slots, 2, dtype=torch.int64)

    @property
    def num_rows(self) -> int:
        """Rows held now."""
        return sum(self._used)

    def reserve(self, num_rows: int) -> None:
        """Makes room for ``num_rows`` insertions; call it before the lookup whose misses will be inserted.

        Raises:
            ValueError: one generation cannot hold that many rows.
        """
        if num_rows > self.rows_per_generation:
            raise ValueError(
                f"the overlay holds {self.rows_per_generation} rows per generation, {num_rows} were asked for"
            )
        if self._used[self._young] + num_rows > self.rows_per_generation:
            self._young = 1 - self._young
            self._used[self._young] = 0
            self.indexes[self._young].zero_()

    def insert(self, keys: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Keeps rows [M, W, H] under distinct new keys int64 [M].

        Returns:
            int64 [M], the kernel references of the rows, with the overlay's two tables numbered 0 and 1.

        Raises:
            ValueError: more rows than were reserved.
        """
        start = self._used[self._young]
        end = start + keys.numel()
        if end > self.rows_per_generation:
            raise ValueError(f"{keys.numel()} rows do not fit after {start} of {self.rows_per_generation}")
        self.row_tables[self._young][start:end] = rows
        numbers = torch.arange(start, end)
        hmi_kernels.plot_index_insert(self.indexes[self._young], keys, numbers)
        self._used[self._young] = end
        return (self._young << hmi_kernels.ROW_BITS) | numbers
