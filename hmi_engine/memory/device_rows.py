"""PLOT rows for a device: tables that fit into its memory lie there, of others a batch's rows are sent."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.memory.causal_view import CausalMergeInputs
from hmi_engine.memory.plot_view import KernelTable, MergeInputs
from hmi_engine.memory.streams import DeviceStreams

__all__ = ["DeviceRows", "LaidOut"]

_ROW_MASK = (1 << hmi_kernels.ROW_BITS) - 1

Inputs = TypeVar("Inputs", MergeInputs, CausalMergeInputs)
"""Of an encoder's batch or a decoder's step."""

LaidOut = Callable[[Sequence[tuple[tuple[int, ...], torch.dtype]]], list[tuple[Tensor, Tensor]]]
"""Gives for shapes and dtypes tensors in page-locked memory, and on the device those that will equal them."""


class DeviceRows:
    """Brings what a merge reads to a device, on its stream ``gather``. For one thread at a time.

    Tables are copied whole when they are first asked for, until the budget is spent; there they stay as long
    as somebody has the original. Unigrams and codebooks always lie on the device: every batch reads them.
    """

    def __init__(self, streams: DeviceStreams, budget_bytes: int) -> None:
        """Nothing is there yet.

        Args:
            streams: of the device.
            budget_bytes: for the rows of whole tables.
        """
        self._streams = streams
        self._budget_bytes = budget_bytes
        self._copies: dict[int, Tensor] = {}
        self._bytes_of_tables: dict[int, int] = {}

    def bring(self, inputs: Inputs, lay_out: LaidOut) -> Inputs:
        """The inputs with tables and unigrams on the device; other tensors stay in host memory.

        Rows of tables that are not there are written to what ``lay_out`` gives, and references changed to
        count them: the caller sends them before the merge.
        """
        references = inputs.references.clone()
        numbers = references >> hmi_kernels.ROW_BITS
        tables: list[KernelTable] = []
        missing: list[tuple[int, Tensor]] = []
        for number, table in enumerate(inputs.tables):
            placed = self._whole(table)
            if placed is None:
                chosen = numbers == number
                rows, members = torch.unique(references[chosen] & _ROW_MASK, return_inverse=True)
                references[chosen] = (number << hmi_kernels.ROW_BITS) + members
                missing.append((number, rows))
            tables.append(placed or table)
        self._lay_out_rows(tables, missing, lay_out)
        unigrams = tuple(self._copy(table) for table in inputs.unigrams)
        return inputs._replace(references=references, tables=tuple(tables), unigrams=unigrams)

    def _lay_out_rows(
        self, tables: list[KernelTable], missing: Sequence[tuple[int, Tensor]], lay_out: LaidOut
    ) -> None:
        """Puts rows of some tables, by their numbers, in the place of these tables."""
        parts = [
            (part, rows)
            for number, rows in missing
            for part in (tables[number].rows, tables[number].row_scales)
        ]
        shapes = [((len(rows) if len(part) else 0, *part.shape[1:]), part.dtype) for part, rows in parts]
        places = lay_out(shapes)
        for (part, rows), (host, _) in zip(parts, places, strict=True):
            if len(part):
                torch.index_select(part, 0, rows, out=host)
        sent = [device for _, device in places]
        for (number, _), rows, row_scales in zip(missing, sent[::2], sent[1::2], strict=True):
            codebooks = self._copy(tables[number].codebooks)
            tables[number] = tables[number]._replace(rows=rows, row_scales=row_scales, codebooks=codebooks)

    def _whole(self, table: KernelTable) -> KernelTable | None:
        """The table on the device, if it is there or fits."""
        key = id(table.rows)
        if key not in self._bytes_of_tables:
            num_bytes = table.rows.nbytes + table.row_scales.nbytes
            if not table.is_lasting or sum(self._bytes_of_tables.values()) + num_bytes > self._budget_bytes:
                return None
            self._bytes_of_tables[key] = num_bytes
            weakref.finalize(table.rows, self._bytes_of_tables.pop, key, None)
        rows, row_scales, codebooks = map(self._copy, (table.rows, table.row_scales, table.codebooks))
        return table._replace(rows=rows, row_scales=row_scales, codebooks=codebooks)

    def _copy(self, tensor: Tensor) -> Tensor:
        """A tensor on the device, copied when it is first asked for; gone with the original."""
        key = id(tensor)
        if key not in self._copies:
            with self._streams.on("gather"):
                copied = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._streams.device)
                copied.copy_(tensor)
            self._copies[key] = copied
            weakref.finalize(tensor, self._copies.pop, key, None)
        return self._copies[key]
