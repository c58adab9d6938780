"""Windows computed in traffic, kept in bounded memory beside the PLOT and shared by all batches."""

from __future__ import annotations

import threading
import weakref

import torch

import hmi_kernels

__all__ = ["OverlayTable", "WindowOverlay"]

GENERATIONS = 2
SURVIVING_SHARE = 0.5
"""Most of a new generation that the rows of the oldest may take: the rest stays for what is new."""

_FIRST_INDEX_SLOTS = 1 << 10
_MOST_INDEX_BYTES_PER_ROW = 4 * 16  # at most half full, and a power of two
_COUNTS_BYTES_PER_ROW = 8 + 4


class OverlayTable:
    """Rows of one layer identity in one generation. Rows are added and never changed.

    Attributes:
        index: int64 [slots, 2], finds rows by key. A larger one takes its place when it is half full; whoever
            still holds this one finds what it found before.
        rows: [capacity, W, H]; those that ``index`` does not find hold nothing.
    """

    def __init__(self, capacity: int, window: int, hidden_size: int, dtype: torch.dtype) -> None:
        """Reserves address space; the operating system gives pages as rows arrive."""
        self.index = torch.zeros(_FIRST_INDEX_SLOTS, 2, dtype=torch.int64)
        self.rows = torch.empty(capacity, window, hidden_size, dtype=dtype)
        self._keys = torch.empty(capacity, dtype=torch.int64)
        self._hits = torch.zeros(capacity, dtype=torch.int32)
        self._used = 0

    @property
    def num_rows(self) -> int:
        """Rows held now."""
        return self._used

    def find(self, keys: torch.Tensor) -> torch.Tensor:
        """Row of each key, -1 where missing: int64 like ``keys``."""
        return hmi_kernels.plot_index_find(self.index, keys)

    def add(self, keys: torch.Tensor, rows: torch.Tensor, hits: torch.Tensor | None = None) -> None:
        """Adds distinct new keys int64 [M] with their rows [M, W, H] and the hits int32 [M] they start with.

        The caller sees to it that they fit and that nobody else adds at the same time.
        """
        start, end = self._used, self._used + keys.numel()
        self.rows[start:end] = rows
        self._keys[start:end] = keys
        if hits is not None:
            self._hits[start:end] = hits
        self._used = end
        if 2 * end > len(self.index):
            self._grow(end)
        else:
            hmi_kernels.plot_index_insert(self.index, keys, torch.arange(start, end))

    def _grow(self, num_rows: int) -> None:
        slots = 1 << (4 * num_rows - 1).bit_length()
        slots = min(slots, 1 << (2 * len(self.rows) - 1).bit_length())
        larger = torch.zeros(slots, 2, dtype=torch.int64)
        hmi_kernels.plot_index_insert(larger, self._keys[:num_rows], torch.arange(num_rows))
        self.index = larger

    def count_hits(self, rows: torch.Tensor) -> None:
        """Counts one use of each of ``rows`` int64 [N], which may repeat."""
        self._hits.index_add_(0, rows, torch.ones(rows.numel(), dtype=torch.int32))

    def most_used(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows that were used since they were added, and how often: int64 [N], int32 [N]."""
        hits = self._hits[: self._used]
        used = hits.nonzero()[:, 0]
        return used, hits[used]

    def copy_to(self, other: OverlayTable, rows: torch.Tensor) -> None:
        """Adds some rows to another table, with half of their hits: what was used long ago counts less."""
        other.add(self._keys[rows], self.rows[rows], self._hits[rows] // 2)


class _Generation:
    """Tables by layer identity that together hold at most ``capacity`` rows."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tables: dict[str, OverlayTable] = {}

    @property
    def num_rows(self) -> int:
        return sum(table.num_rows for table in self.tables.values())

    @property
    def room(self) -> int:
        return self.capacity - self.num_rows


class WindowOverlay:
    """Rows of computed windows in two generations, a young and an old one; safe to use from many threads.

    New rows go to the young generation. When it is full it becomes the old one, and the oldest is given up,
    but for those of its rows that were found most often: they begin the next young generation, up to
    ``SURVIVING_SHARE`` of it. A row is written once, into memory that nothing else is ever written to, so it
    stays what it is as long as somebody holds its table, also after the overlay has given it up.

    While the generation that was given up last is still held by a batch, the next turn has to wait: what does
    not fit is not kept. So the memory is at most one and a half times ``capacity_bytes``, and only then.

    Rows have the type of the store's float rows, so that an output does not depend on which of the two holds
    a window.
    """

    def __init__(self, capacity_bytes: int, window: int, hidden_size: int, dtype: torch.dtype) -> None:
        """An overlay that is too small for a row in each generation keeps nothing."""
        row_bytes = window * hidden_size * dtype.itemsize + _MOST_INDEX_BYTES_PER_ROW + _COUNTS_BYTES_PER_ROW
        self.rows_per_generation = capacity_bytes // (GENERATIONS * row_bytes)
        self._shape, self._dtype = (window, hidden_size), dtype
        self._young = _Generation(self.rows_per_generation)
        self._old = _Generation(self.rows_per_generation)
        self._given_up: weakref.ref[_Generation] | None = None
        self._adding = threading.Lock()  # held while rows are copied; looking up never waits for it
        self._turning = threading.Lock()

    @property
    def num_rows(self) -> int:
        """Rows held now."""
        with self._turning:
            return self._young.num_rows + self._old.num_rows

    def hold(self, identity: str) -> OverlayHold:
        """The tables of a layer identity as they are now, which stay as long as the result is held."""
        with self._turning:
            generations = (self._young, self._old)
        return OverlayHold(generations, identity)

    def keep(self, identity: str, keys: torch.Tensor, rows: torch.Tensor) -> int:
        """Keeps rows [M, W, H] under distinct keys int64 [M], as far as there is room.

        Keys that another batch has added meanwhile are left alone: their rows are the same.

        Returns:
            How many were added.
        """
        with self._adding:
            chosen = self._new(identity, keys)
            if chosen.numel() > self._young.room:
                self._turn()
                chosen = self._new(identity, keys)[: self._young.room]
            if chosen.numel():
                self._table(self._young, identity).add(keys[chosen], rows[chosen])
            return chosen.numel()

    def clear(self) -> None:
        """Forgets everything."""
        with self._adding, self._turning:
            self._young = _Generation(self.rows_per_generation)
            self._old = _Generation(self.rows_per_generation)

    def _new(self, identity: str, keys: torch.Tensor) -> torch.Tensor:
        """Which of the keys neither generation has, as indexes int64."""
        new = torch.ones(len(keys), dtype=torch.bool)
        for generation in (self._young, self._old):
            if identity in generation.tables:
                new &= generation.tables[identity].find(keys) < 0
        return new.nonzero()[:, 0]

    def _table(self, generation: _Generation, identity: str) -> OverlayTable:
        if identity not in generation.tables:
            generation.tables[identity] = OverlayTable(generation.capacity, *self._shape, self._dtype)
        return generation.tables[identity]

    def _turn(self) -> None:
        """Makes the young generation the old one, unless the one given up before is still in use."""
        if self._given_up is not None and self._given_up() is not None:
            return
        young = _Generation(self.rows_per_generation)
        self._survive(young)
        with self._turning:
            self._given_up = weakref.ref(self._old)
            self._old, self._young = self._young, young

    def _survive(self, young: _Generation) -> None:
        """Copies the most used rows of the oldest generation into the next young one."""
        tables = list(self._old.tables.items())
        if not tables:
            return
        used, hits = zip(*(table.most_used() for _, table in tables), strict=True)
        room = int(SURVIVING_SHARE * young.capacity)
        best = torch.topk(torch.cat(hits), min(room, sum(map(len, hits)))).indices
        for (identity, table), rows, first in zip(
            tables, used, torch.tensor([0, *map(len, used)]).cumsum(0).tolist(), strict=False
        ):
            chosen = best[(best >= first) & (best < first + len(rows))] - first
            if chosen.numel():
                table.copy_to(self._table(young, identity), rows[chosen])


class OverlayHold:
    """The overlay's tables of one layer identity as a batch found them, youngest first."""

    def __init__(self, generations: tuple[_Generation, ...], identity: str) -> None:
        self._generations = generations  # held, so that the overlay knows that they are in use
        self.tables = tuple(
            generation.tables[identity] for generation in generations if identity in generation.tables
        )
