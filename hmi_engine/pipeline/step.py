"""One batch: prepare (n-gram search, adapters in memory), compute, read out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch

from hmi_engine.errors import HmiError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.memory.adapter_batch import AdapterBatch
from hmi_engine.memory.plot_view import PlotView
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.memory.residency import AdapterResidency
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.traffic import TrafficRecorder
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PackedSequences, Readout
from hmi_engine.pipeline.read_out import HeadOutput, read_out

__all__ = ["BatchItem", "BatchResult", "BatchRunner", "MissPolicy", "PlotStatistics"]

MissPolicy = Literal["backoff", "exact", "budget"]
"""Where the PLOT has no row: compose it from shorter n-grams, compute it, or compute the most frequent."""


@dataclass(frozen=True)
class BatchItem:
    """A sequence of a batch: its tenant and its token ids."""

    tenant: TenantInfo
    input_ids: list[int]


@dataclass(frozen=True)
class BatchResult:
    """What a batch gave.

    Attributes:
        outputs: per item, what its tenant's head gave, or the error that kept it from being served.
        prepare_seconds: search and loading.
        compute_seconds: the model.
    """

    outputs: list[HeadOutput | HmiError]
    prepare_seconds: float
    compute_seconds: float


@dataclass
class PlotStatistics:
    """How the lookups of an engine went.

    Attributes:
        tokens: tokens looked up.
        windows: those of them that have a window.
        window_hits: those whose window was found, in a table or among the windows computed earlier.
        bigram_backoffs: of width 3, those without it where a bigram was found.
        windows_computed: distinct windows that went through the domain layers.
        budget_skipped: tokens whose window was left to back-off because the budget was spent.
    """

    tokens: int = 0
    windows: int = 0
    window_hits: int = 0
    bigram_backoffs: int = 0
    windows_computed: int = 0
    budget_skipped: int = 0


class BatchRunner:
    """Runs batches against one base model, its PLOT tables and the resident adapters."""

    def __init__(
        self,
        general: GeneralInfo,
        model: HierarchicalBert,
        plots: PlotLibrary | None,
        residency: AdapterResidency,
        *,
        miss: MissPolicy,
        exact_budget: float,
        recorder: TrafficRecorder | None = None,
    ) -> None:
        """Runs nothing yet.

        Args:
            general: the base model's description.
            model: the base model.
            plots: the tables; None where no layers are looked up.
            residency: loads adapters.
            miss: what to do where the tables have no row.
            exact_budget: most windows to compute per token of a batch, under ``miss="budget"``.
            recorder: counts what is looked up, which a budget goes by.
        """
        self._general = general
        self._model = model
        self._plots = plots
        self._residency = residency
        self._miss = miss
        self._exact_budget = exact_budget
        self._recorder = recorder
        self.plot_statistics = PlotStatistics()

    @torch.no_grad()
    def run(self, items: Sequence[BatchItem]) -> BatchResult:
        """Answers a batch, whose items of one tenant stand together.

        An item whose tenant or domain cannot be loaded gets the error; the others are computed.
        """
        started = prepared = time.perf_counter()
        with (
            self._residency.holding([item.tenant for item in items]) as tenants,
            # A tenant that was replaced since its request was admitted may have another domain.
            self._reading([each.info.domain for each in tenants if not isinstance(each, HmiError)]) as (
                view,
                failed,
            ),
        ):
            outputs: list[HeadOutput | HmiError | None] = [
                tenant if isinstance(tenant, HmiError) else failed.get(tenant.info.domain)
                for tenant in tenants
            ]
            served = [(index, tenant) for index, tenant in enumerate(tenants) if outputs[index] is None]
            if served:
                residents = [cast(ResidentTenant, tenant) for _, tenant in served]
                prepared, parts = self._compute([items[index] for index, _ in served], residents, view)
                read = read_out(residents, parts, self._model)
                for (index, _), output in zip(served, read, strict=True):
                    outputs[index] = output
        finished = time.perf_counter()
        return BatchResult(
            cast("list[HeadOutput | HmiError]", outputs), prepared - started, finished - prepared
        )

    @contextmanager
    def _reading(self, domains: Sequence[str]) -> Iterator[tuple[PlotView | None, dict[str, HmiError]]]:
        """A lease on the domains' tables, and the domains whose tables cannot be read, with the reason."""
        if self._plots is None:
            yield None, {}
            return
        failed: dict[str, HmiError] = {}
        try:
            view = self._plots.reading(domains)
        except HmiError:
            failed = self._unreadable(self._plots, domains)
            view = self._plots.reading([domain for domain in domains if domain not in failed])
        with view:
            yield view, failed

    @staticmethod
    def _unreadable(plots: PlotLibrary, domains: Sequence[str]) -> dict[str, HmiError]:
        failed: dict[str, HmiError] = {}
        for domain in dict.fromkeys(domains):
            try:
                plots.reading([domain]).release()
            except HmiError as error:
                failed[domain] = error
        return failed

    def _compute(
        self, items: Sequence[BatchItem], tenants: Sequence[ResidentTenant], view: PlotView | None
    ) -> tuple[float, tuple[torch.Tensor, ...]]:
        sequences = PackedSequences.pack([item.input_ids for item in items])
        first_only = [tenant.head.pooling in ("cls", "pooler") for tenant in tenants]
        readout = Readout.select(sequences, first_only)
        counts = sequences.lengths if readout is None else readout.counts
        adapters = AdapterBatch(
            self._residency.arena.memory,
            self._residency.slots,
            tenants,
            sequences.lengths,
            counts,
        )
        hidden_states = self._enter(sequences, [tenant.info.domain for tenant in tenants], view)
        prepared = time.perf_counter()
        hidden_states = self._model.run_layers(
            hidden_states, sequences, first=self._general.plot_layers, adapters=adapters, readout=readout
        )
        return prepared, hidden_states.split(counts)

    def _enter(
        self, sequences: PackedSequences, domains: Sequence[str], view: PlotView | None
    ) -> torch.Tensor:
        """The input of the first upper layer: looked up, or, with K = 0, the embeddings."""
        if view is None:
            return self._model.embed(sequences.input_ids, sequences.positions())
        references = view.lookup(sequences, domains)
        self._count(sequences, references)
        if self._recorder is not None:
            self._recorder.record(sequences, domains, view.in_tables(references[:, 0]))
        if self._miss != "backoff":
            limit = int(self._exact_budget * sequences.num_tokens) if self._miss == "budget" else None
            weights = partial(self._recorder.weights_of, domains=domains) if self._recorder else None
            references, computed, skipped = view.compute_misses(
                self._model, sequences, domains, references, limit=limit, weights=weights
            )
            self.plot_statistics.windows_computed += computed
            self.plot_statistics.budget_skipped += skipped
        return view.merge(self._model, sequences, domains, references)

    def _count(self, sequences: PackedSequences, references: torch.Tensor) -> None:
        statistics = self.plot_statistics
        hits = int((references[:, 0] >= 0).sum())
        windows = sequences.num_tokens
        if self._general.window == 2:
            windows -= sequences.num_sequences  # the last token of a sequence opens no bigram
        else:
            statistics.bigram_backoffs += int((references[:, 1:] >= 0).any(dim=1).sum())
        statistics.tokens += sequences.num_tokens
        statistics.windows += windows
        statistics.window_hits += hits
