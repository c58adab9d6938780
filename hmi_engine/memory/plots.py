"""The PLOT tables of a store, open for lookup, and what is computed where they miss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

import hmi_kernels
from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.plot_table import PlotTable, open_plot
from hmi_engine.memory.overlay import OVERLAY_TABLES, WindowOverlay
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PackedSequences

__all__ = ["DEFAULT_OVERLAY_BYTES", "PlotLibrary"]

DEFAULT_OVERLAY_BYTES = 256 << 20


@dataclass(frozen=True)
class _DomainTables:
    """Kernel table numbers that a domain's lookups search, in order, and the number of its unigram table."""

    chain: tuple[int, ...]
    unigrams: int
    names: tuple[str, ...]


class PlotLibrary:
    """Opens tables at first use, numbers them for the kernels and keeps them until :meth:`close`.

    Tables 0 and 1 are the overlay. A table once open stays valid when the store replaces its file: readers
    keep the old generation; :meth:`forget` makes the next lookup see the new one.

    A caller that uses ``compute_misses`` holds the library for one batch at a time: references stay valid
    until the next ``lookup``.
    """

    def __init__(
        self,
        layout: StoreLayout,
        catalog: Catalog,
        general: GeneralInfo,
        *,
        overlay_bytes: int = DEFAULT_OVERLAY_BYTES,
    ) -> None:
        self._layout = layout
        self._catalog = catalog
        self._general = general
        self.row_dtype = getattr(torch, general.row_dtype)
        self.overlay = WindowOverlay(overlay_bytes, general.window, general.hidden_size, self.row_dtype)
        self._indexes: list[torch.Tensor] = list(self.overlay.indexes)
        self._rows: list[torch.Tensor] = list(self.overlay.row_tables)
        self._tables: list[PlotTable | None] = [None] * OVERLAY_TABLES
        self._unigrams: list[torch.Tensor] = []
        self._opened: dict[str, tuple[int, int | None]] = {}  # file -> row table, unigram table
        self._domains: dict[str, _DomainTables] = {}

    def forget(self) -> None:
        """Reads the tree from the catalog again at the next lookup: a name may stand for another domain now.

        Tables stay open; files are never reused, so one that is still current is not opened again.
        """
        self._domains.clear()

    def ancestors(self, domain: str) -> tuple[str, ...]:
        """Names from the domain to the root among nodes with the same domain layers.

        Raises:
            UnknownDomainError: no such domain.
        """
        return self._domain(domain).names

    def table(self, domain: str) -> PlotTable | None:
        """The domain's own table, or None where it has none.

        Raises:
            UnknownDomainError: no such domain.
        """
        info = self._catalog.domains[domain]
        if not info.file:
            return None
        return self._tables[self._open(info.file)[0]]

    def lookup(self, sequences: PackedSequences, domains: Sequence[str]) -> torch.Tensor:
        """Finds the rows of every position's window.

        Args:
            sequences: packed sequences.
            domains: the domain of each sequence.

        Returns:
            int64 [T, 1] or [T, 3], as ``hmi_kernels.plot_lookup`` describes; -1 where missing.

        Raises:
            UnknownDomainError: no such domain.
            StoreCorruptError: a table cannot be read.
        """
        # At most one new row per position, and all rows of a batch must stay until it has been merged.
        self.overlay.reserve(min(sequences.num_tokens, self.overlay.rows_per_generation))
        overlay = tuple(range(OVERLAY_TABLES)) if self.overlay.num_rows else ()
        chains = [self._domain(domain).chain + overlay for domain in domains]
        width = max(map(len, chains))
        padded = torch.tensor([chain + (-1,) * (width - len(chain)) for chain in chains], dtype=torch.int32)
        return hmi_kernels.plot_lookup(
            sequences.input_ids, sequences.offsets, self._indexes, padded, window=self._general.window
        )

    def compute_misses(
        self, model: HierarchicalBert, sequences: PackedSequences, references: torch.Tensor
    ) -> torch.Tensor:
        """Computes every missing window once, keeps it in the overlay, and returns complete references.

        Args:
            model: the base whose domain layers compute the windows.
            sequences: the sequences that ``references`` were looked up for.
            references: the result of :meth:`lookup`, which is not changed.

        Raises:
            ValueError: more distinct windows are missing than the overlay holds.
        """
        windows = self.windows(sequences)
        missing = (references[:, 0] < 0) & (windows[:, : self._general.window] >= 0).sum(1).ge(self._least)
        positions = missing.nonzero()[:, 0]
        if positions.numel() == 0:
            return references
        keys = hmi_kernels.ngram_keys(windows[positions])
        distinct, members = torch.unique(keys, return_inverse=True)
        tokens = hmi_kernels.ngram_tokens(distinct)[:, : self._general.window]
        rows = torch.cat([model.window_states(part).to(self.row_dtype) for part in tokens.split(8192)])
        found = self.overlay.insert(distinct, rows)
        complete = references.clone()
        complete[positions, 0] = found[members]
        return complete

    @property
    def _least(self) -> int:
        """Tokens that a window has at least to be looked up: a one-token bigram window is its unigram row."""
        return 2 if self._general.window == 2 else 1

    def windows(self, sequences: PackedSequences) -> torch.Tensor:
        """Token ids of each position's window by slot, -1 where absent: int32 [T, 3]."""
        ids, num_tokens = sequences.input_ids, sequences.num_tokens
        absent = torch.full((1,), -1, dtype=torch.int32)
        before, after = torch.cat([absent, ids[:-1]]), torch.cat([ids[1:], absent])
        before[sequences.offsets[:-1]] = -1
        after[sequences.offsets[1:] - 1] = -1
        if self._general.window == 2:
            return torch.stack([ids, after, absent.expand(num_tokens)], dim=1)
        return torch.stack([before, ids, after], dim=1)

    def merge(
        self,
        model: HierarchicalBert,
        sequences: PackedSequences,
        domains: Sequence[str],
        references: torch.Tensor,
    ) -> torch.Tensor:
        """Adds up the rows, the position and the merge's LayerNorm: the input of layer K, float32 [T, H]."""
        unigrams = torch.tensor([self._domain(domain).unigrams for domain in domains], dtype=torch.int32)
        return hmi_kernels.plot_merge(
            sequences.input_ids,
            sequences.offsets,
            references,
            self._rows,
            self._unigrams,
            unigrams,
            model.merge_positions,
            model.merge_norm.weight,
            model.merge_norm.bias,
            layer_norm_eps=model.merge_norm.eps,
            window=self._general.window,
        )

    def row_counts(self, references: torch.Tensor) -> torch.Tensor:
        """Corpus count of each referenced n-gram, int64 like ``references``; 0 where missing or computed."""
        return self._per_row(references, "row_counts")

    def row_keys(self, references: torch.Tensor) -> torch.Tensor:
        """Key of each referenced n-gram, int64 like ``references``; 0 where missing or computed."""
        return self._per_row(references, "row_keys")

    def _per_row(self, references: torch.Tensor, field: str) -> torch.Tensor:
        result = torch.zeros_like(references)
        tables = references >> hmi_kernels.ROW_BITS
        rows = references & ((1 << hmi_kernels.ROW_BITS) - 1)
        for number in torch.unique(tables).tolist():
            table = self._tables[number] if number >= 0 else None
            if table is not None:
                chosen = tables == number
                values: torch.Tensor = getattr(table, field)
                result[chosen] = values[rows[chosen]]
        return result

    def close(self) -> None:
        """Lets go of all tables."""
        self._domains.clear()
        self._opened.clear()
        self._indexes, self._rows, self._unigrams, self._tables = [], [], [], []

    def _domain(self, name: str) -> _DomainTables:
        if name not in self._domains:
            nodes = self._catalog.chain(name)
            opened = [self._open(node.file) for node in nodes if node.file]
            unigrams = [number for _, number in opened if number is not None]
            if not unigrams:
                raise StoreCorruptError(
                    f"domain {name!r} has no unigram table on its way to the root; run `hmi verify`"
                )
            self._domains[name] = _DomainTables(
                chain=tuple(number for number, _ in opened),
                unigrams=unigrams[0],
                names=tuple(node.name for node in nodes),
            )
        return self._domains[name]

    def _open(self, file: str) -> tuple[int, int | None]:
        if file not in self._opened:
            table = open_plot(self._layout.resolve(file), self._general)
            unigrams = None
            if table.unigrams is not None:
                unigrams = len(self._unigrams)
                self._unigrams.append(table.unigrams)
            self._opened[file] = (len(self._tables), unigrams)
            self._tables.append(table)
            self._indexes.append(table.index)
            self._rows.append(table.rows)
        return self._opened[file]
