"""What one batch reads of the PLOT: lookup, the windows that are missing, merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import NamedTuple

import torch

import hmi_kernels
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.plot_table import PlotTable
from hmi_engine.memory.missing_windows import MissingWindows, find_missing, most_wanted
from hmi_engine.memory.overlay import OverlayHold, OverlayTable, WindowOverlay
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.families import HierarchicalModel
from hmi_engine.models.packing import PackedSequences
from hmi_engine.models.windows import fill_places

__all__ = [
    "CompletedReferences",
    "DomainLayers",
    "KernelTable",
    "MergeInputs",
    "PlotView",
    "SearchedDomain",
    "merge_rows",
]

DomainLayers = Callable[[torch.Tensor], torch.Tensor]
"""Runs windows, int32 [M, W] token ids with -1 where absent, through K layers: float32 [M, W, H].

A decoder's gives only the last token's: [M, 1, H]."""

_ROW_MASK = (1 << hmi_kernels.ROW_BITS) - 1


@dataclass(frozen=True)
class SearchedDomain:
    """Where a domain's rows are looked for.

    Attributes:
        identity: names the weights of its domain layers.
        names: the domain and those of its ancestors that have the same layers, nearest first.
        tables: the tables among them, by name, in this order.
        unigrams: [V, 3, H], the nearest unigram rows.
    """

    identity: str
    names: tuple[str, ...]
    tables: Mapping[str, PlotTable]
    unigrams: torch.Tensor


class KernelTable(NamedTuple):
    """One table as the kernels take it; empty tensors where there are no scales or codebooks, or no index.

    ``is_lasting`` says that it is a domain's own, whose rows do not change.
    """

    key_index: torch.Tensor
    rows: torch.Tensor
    row_scales: torch.Tensor
    codebooks: torch.Tensor
    is_lasting: bool = False


class MergeInputs(NamedTuple):
    """A batch's tokens, rows and domains, as ``hmi_kernels.plot_merge`` takes them.

    ``references`` int64 [T, 1] or [T, 3] are to rows of ``tables``; ``unigrams_of_sequences`` int32 [S] say
    which of ``unigrams`` [V, 3, H] each sequence uses.
    """

    input_ids: torch.Tensor
    offsets: torch.Tensor
    references: torch.Tensor
    tables: tuple[KernelTable, ...]
    unigrams: tuple[torch.Tensor, ...]
    unigrams_of_sequences: torch.Tensor


class CompletedReferences(NamedTuple):
    """References int64 [T, 1] or [T, 3] after computing misses.

    ``computed`` distinct windows went through the domain layers; ``skipped`` positions still miss theirs.
    """

    references: torch.Tensor
    computed: int
    skipped: int


class PlotView(AbstractContextManager["PlotView"]):
    """A lease on the tables of some domains, as they were when it was made. For one thread.

    References that :meth:`lookup` and :meth:`compute_misses` return are valid in this view only. Rows in the
    tables and in the overlay stay as they are until the view is released, whatever the store and other
    batches do meanwhile.
    """

    def __init__(
        self,
        general: GeneralInfo,
        searched: Mapping[str, SearchedDomain],
        overlay: WindowOverlay,
        domain_layers: Callable[[str], DomainLayers] | None,
    ) -> None:
        """Use :meth:`hmi_engine.memory.plots.PlotLibrary.reading`."""
        self._general = general
        self._searched = dict(searched)
        self._overlay = overlay
        self._domain_layers = domain_layers
        identities = dict.fromkeys(domain.identity for domain in self._searched.values())
        self._holds = {identity: overlay.hold(identity) for identity in identities}
        self._plots: list[PlotTable] = []
        self._computed_in_traffic: dict[int, OverlayTable] = {}
        self.kernel_tables: list[KernelTable] = []
        self._number_tables()

    def _number_tables(self) -> None:
        """Numbers PLOTs from 0 on, then the overlay's tables; what is computed comes after them."""
        plots = {id(table): table for domain in self._searched.values() for table in domain.tables.values()}
        self._plots = list(plots.values())
        self.kernel_tables = [_kernel_table(table) for table in self._plots]
        numbers = {key: number for number, key in enumerate(plots)}
        held = {identity: self._number_overlay(hold) for identity, hold in self._holds.items()}
        chains = [
            [*(numbers[id(table)] for table in domain.tables.values()), *held[domain.identity]]
            for domain in self._searched.values()
        ]
        width = max(map(len, chains), default=0)
        self.chains = torch.tensor([chain + [-1] * (width - len(chain)) for chain in chains]).int()
        self._places = {name: place for place, name in enumerate(self._searched)}

    def _number_overlay(self, hold: OverlayHold) -> list[int]:
        first = len(self.kernel_tables)
        for number, table in enumerate(hold.tables, first):
            self.kernel_tables.append(KernelTable(table.index, table.rows, _NONE_FLOAT, _NONE_HALF))
            self._computed_in_traffic[number] = table
        return list(range(first, first + len(hold.tables)))

    def release(self) -> None:
        """Gives the tables back; a second call does nothing. The view is of no use afterwards."""
        self._searched, self._holds, self._computed_in_traffic = {}, {}, {}
        self._plots, self.kernel_tables = [], []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Releases the view."""
        self.release()

    @property
    def searched(self) -> Mapping[str, SearchedDomain]:
        """Where the rows of each leased domain are looked for."""
        return self._searched

    def ancestors(self, domain: str) -> tuple[str, ...]:
        """Names from the domain to the root among nodes with the same domain layers."""
        return self._searched[domain].names

    def table(self, domain: str) -> PlotTable | None:
        """The own table of a leased domain or of one of its ancestors; None where it has none."""
        tables = [searched.tables.get(domain) for searched in self._searched.values()]
        return next((table for table in tables if table is not None), None)

    def lookup(self, sequences: PackedSequences, domains: Sequence[str]) -> torch.Tensor:
        """Finds the rows of every position's window.

        Args:
            sequences: packed sequences.
            domains: the domain of each sequence, among those of the lease.

        Returns:
            int64 [T, 1] or [T, 3], as ``hmi_kernels.plot_lookup`` describes; -1 where missing.
        """
        references = hmi_kernels.plot_lookup(
            sequences.input_ids,
            sequences.offsets,
            [table.key_index for table in self.kernel_tables],
            self.chains[self.places_of(domains)],
            window=self._general.window,
        )
        self.count_overlay_hits(references)
        return references

    def count_overlay_hits(self, references: torch.Tensor) -> None:
        """Notes the use of rows that were computed in traffic."""
        for number, table in self._computed_in_traffic.items():
            found = references[references >> hmi_kernels.ROW_BITS == number]
            table.count_hits(found & _ROW_MASK)

    def in_tables(self, references: torch.Tensor) -> torch.Tensor:
        """Which references are to rows of the domains' own tables, and not computed in traffic: bool."""
        return (references >= 0) & (references >> hmi_kernels.ROW_BITS < len(self._plots))

    def compute_misses(
        self,
        model: HierarchicalBert,
        sequences: PackedSequences,
        domains: Sequence[str],
        references: torch.Tensor,
        *,
        limit: int | None = None,
        weights: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> CompletedReferences:
        """Computes missing windows, each once, and offers them to the overlay for later batches.

        Args:
            model: the base, whose domain layers compute the windows of domains that have none of their own.
            sequences: the sequences that ``references`` were looked up for.
            domains: the domain of each sequence.
            references: the result of :meth:`lookup`, which is not changed.
            limit: compute at most so many windows, those that the batch has most often; default all.
            weights: with ``limit``, how often traffic asked for n-grams lately: keys int64 [M] -> [M], not
                negative. Of windows that the batch has equally often, those come first of which this and the
                counts of the domains' tables are the greatest.
        """
        identities = [self._searched[domain].identity for domain in domains]
        missing = find_missing(sequences, references, identities, window=self._general.window)
        compute = partial(self._compute, model)
        return self.complete(references, missing, compute, limit=limit, weights=weights)

    def complete(
        self,
        references: torch.Tensor,
        missing: Sequence[MissingWindows],
        compute: Callable[[MissingWindows], torch.Tensor],
        *,
        limit: int | None = None,
        weights: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> CompletedReferences:
        """Puts what is missing into the first column of references int64 [T, C], which are not changed.

        Args:
            references: what a look-up found.
            missing: the windows that it did not.
            compute: gives the references int64 [M] of M windows' rows.
            limit: as of :meth:`compute_misses`.
            weights: likewise.
        """
        wanted = missing
        if limit is not None and sum(len(part.keys) for part in missing) > limit:
            frequencies = [self._counted(part.keys) for part in missing]
            if weights is not None:
                frequencies = [
                    counted + weights(part.keys) for counted, part in zip(frequencies, missing, strict=True)
                ]
            wanted = most_wanted(missing, frequencies, limit)
        complete = references.clone() if wanted else references
        for part in wanted:
            complete[part.positions, 0] = compute(part)[part.members]
        positions = sum(len(part.positions) for part in missing)
        return CompletedReferences(
            complete,
            computed=sum(len(part.keys) for part in wanted),
            skipped=positions - sum(len(part.positions) for part in wanted),
        )

    def _compute(self, model: HierarchicalBert, missing: MissingWindows) -> torch.Tensor:
        """Rows of the windows, in a table that only this view has; returns their references int64 [M]."""
        tokens = hmi_kernels.ngram_tokens(missing.keys)[:, : self._general.window]
        tokens = fill_places(tokens, self._general.placeholder_token_id)
        return self.keep_computed(missing, self.layers_of(model, missing.identity)(tokens))

    def layers_of(self, model: HierarchicalModel, identity: str) -> DomainLayers:
        """The domain layers of an identity: those of ``model``, the base, or of a domain that has its own."""
        if self._domain_layers is None or identity == self._general.domain_layers:
            return model.window_states
        return self._domain_layers(identity)

    def keep_computed(self, missing: MissingWindows, states: torch.Tensor) -> torch.Tensor:
        """Puts states float32 [M, W, H] of windows into a table that only this view has, and the overlay.

        Returns their references int64 [M].
        """
        rows = states.to(getattr(torch, self._general.row_dtype))
        self._overlay.keep(missing.identity, missing.keys, rows)
        number = len(self.kernel_tables)
        self.kernel_tables.append(KernelTable(_NO_INDEX, rows, _NONE_FLOAT, _NONE_HALF))
        return (number << hmi_kernels.ROW_BITS) + torch.arange(len(rows))

    def identity_of(self, domain: str) -> str:
        """The layer identity of a leased domain."""
        return self._searched[domain].identity

    @property
    def unigram_tables(self) -> list[torch.Tensor]:
        """Of each leased domain its unigram rows, in the order of :meth:`places_of`."""
        return [domain.unigrams for domain in self._searched.values()]

    def _counted(self, keys: torch.Tensor) -> torch.Tensor:
        """How often the leased tables counted n-grams that got no row, in occurrences of now: float64 [M]."""
        result = torch.zeros(len(keys), dtype=torch.float64)
        for table in self._plots:
            candidates = table.candidate_keys
            if len(candidates):
                places = torch.searchsorted(candidates, keys).clamp_(max=len(candidates) - 1)
                counts = torch.where(candidates[places] == keys, table.candidate_counts[places], 0)
                result += counts / table.metadata.occurrence_weight
        return result

    def merge(
        self,
        model: HierarchicalBert,
        sequences: PackedSequences,
        domains: Sequence[str],
        references: torch.Tensor,
    ) -> torch.Tensor:
        """Adds up the rows, the position and the merge's LayerNorm: layer K's input [T, H], of its dtype."""
        inputs = self.merge_inputs(sequences, domains, references)
        return merge_rows(model, inputs, window=self._general.window)

    def merge_inputs(
        self, sequences: PackedSequences, domains: Sequence[str], references: torch.Tensor
    ) -> MergeInputs:
        """What :meth:`merge` reads, all in host memory."""
        return MergeInputs(
            sequences.input_ids,
            sequences.offsets,
            references,
            tuple(self.kernel_tables),
            tuple(self.unigram_tables),
            self.places_of(domains).int(),
        )

    def row_counts(self, references: torch.Tensor) -> torch.Tensor:
        """Corpus count of each referenced n-gram, int64 like ``references``; 0 where missing or computed."""
        return self._per_row(references, [table.row_counts for table in self._plots])

    def row_keys(self, references: torch.Tensor) -> torch.Tensor:
        """Key of each referenced n-gram, int64 like ``references``; 0 where missing or computed."""
        return self._per_row(references, [table.row_keys for table in self._plots])

    def _per_row(self, references: torch.Tensor, values: Sequence[torch.Tensor]) -> torch.Tensor:
        result = torch.zeros_like(references)
        tables = references >> hmi_kernels.ROW_BITS
        for number, of_table in enumerate(values):
            chosen = tables == number
            result[chosen] = of_table[references[chosen] & _ROW_MASK]
        return result

    def places_of(self, domains: Sequence[str]) -> torch.Tensor:
        """Which of the leased domains each one is, int64 [S]."""
        return torch.tensor([self._places[domain] for domain in domains], dtype=torch.int64)


_NONE_FLOAT = torch.empty(0, dtype=torch.float32)
_NONE_HALF = torch.empty(0, dtype=torch.float16)
_NO_INDEX = torch.zeros(2, 2, dtype=torch.int64)


def merge_rows(model: HierarchicalBert, inputs: MergeInputs, *, window: int) -> torch.Tensor:
    """The input of layer K, [T, H], where model and inputs are: see :meth:`PlotView.merge`."""
    return hmi_kernels.plot_merge(
        inputs.input_ids,
        inputs.offsets,
        inputs.references,
        [table.rows for table in inputs.tables],
        inputs.unigrams,
        inputs.unigrams_of_sequences,
        model.merge_positions,
        model.merge_norm.weight,
        model.merge_norm.bias,
        layer_norm_eps=model.merge_norm.eps,
        window=window,
        row_scales=[table.row_scales for table in inputs.tables],
        codebooks=[table.codebooks for table in inputs.tables],
    )


def _kernel_table(table: PlotTable) -> KernelTable:
    return KernelTable(
        table.index,
        table.rows,
        _NONE_FLOAT if table.row_scales is None else table.row_scales,
        _NONE_HALF if table.codebooks is None else table.codebooks,
        is_lasting=True,
    )
