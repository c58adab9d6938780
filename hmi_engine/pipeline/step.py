"""One batch: fetch (adapters in memory), search (n-grams), compute, read out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import torch

from hmi_engine.errors import HmiError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.memory.adapter_batch import AdapterBatch
from hmi_engine.memory.held_tenants import HeldTenants
from hmi_engine.memory.missing_windows import WindowBudget
from hmi_engine.memory.plot_view import PlotView
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.memory.residency import AdapterResidency
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.traffic import TrafficRecorder
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PackedSequences, Readout
from hmi_engine.pipeline.batch_compute import BatchCompute, Outputs, SearchedBatch
from hmi_engine.pipeline.faults import as_fault
from hmi_engine.pipeline.read_out import HeadOutput
from hmi_engine.pipeline.stage_clock import StageClock

__all__ = ["BatchItem", "BatchResult", "BatchRunner", "MissPolicy", "PlotStatistics", "PreparedBatch"]

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
        number: of the batch, counted by the runner from 1.
        started: when its preparation began, in seconds of ``time.perf_counter``.
        prepare_seconds: loading and search.
        compute_seconds: the model.
    """

    outputs: list[HeadOutput | HmiError]
    number: int
    started: float
    prepare_seconds: float
    compute_seconds: float


@dataclass
class PreparedBatch:
    """A batch between fetching and computing; it holds memory until it is computed or discarded.

    Attributes:
        number: counts the batches of the runner.
        outputs: per item its error, None where it will be computed.
        started: when its preparation began, in seconds of ``time.perf_counter``.
        seconds: that it took.
    """

    number: int
    outputs: list[HeadOutput | HmiError | None]
    started: float
    seconds: float = 0.0
    searched: SearchedBatch | None = None
    search_later: Callable[[], None] | None = None
    leases: list[HeldTenants | PlotView] = field(default_factory=list)


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
    """Runs batches against one base model, its PLOT tables and the resident adapters.

    The two halves of a batch, :meth:`prepare` and :meth:`compute`, may run on two threads, each of them for
    one batch at a time. What goes wrong in one fails the items of that batch and nobody else.
    """

    def __init__(
        self,
        general: GeneralInfo,
        model: HierarchicalBert,
        plots: PlotLibrary | None,
        residency: AdapterResidency,
        *,
        miss: MissPolicy,
        exact_budget: float,
        computer: BatchCompute,
        recorder: TrafficRecorder | None = None,
        clock: StageClock | None = None,
    ) -> None:
        """Runs nothing yet.

        Args:
            general: the base model's description.
            model: the base model, on the CPU: computes windows that are missing.
            plots: the tables; None where no layers are looked up.
            residency: loads adapters.
            miss: what to do where the tables have no row.
            exact_budget: most windows to compute per token, under ``miss="budget"``.
            computer: runs the model.
            recorder: counts what is looked up, which a budget goes by.
            clock: adds up what the stages take.
        """
        self._general = general
        self._model = model
        self._plots = plots
        self._residency = residency
        self._miss = miss
        self._budget = WindowBudget(exact_budget) if miss == "budget" else None
        self._recorder = recorder
        self._clock = clock or StageClock()
        self._computer = computer
        self.is_asynchronous = self._computer.is_asynchronous
        self._num_batches = 0
        self.plot_statistics = PlotStatistics()

    def run(self, items: Sequence[BatchItem]) -> BatchResult:
        """Prepares and computes a batch."""
        return self.compute(self.prepare(items))()

    @torch.no_grad()
    def prepare(self, items: Sequence[BatchItem]) -> PreparedBatch:
        """Loads the tenants of a batch and looks its tokens up; items of one tenant stand together.

        An item whose tenant or domain cannot be loaded gets the error; the others will be computed.
        """
        started = time.perf_counter()
        self._num_batches += 1
        prepared = PreparedBatch(self._num_batches, [None] * len(items), started)
        try:
            with self._clock.working("fetch", prepared.number):
                held = self._residency.holding([item.tenant for item in items], wait=True)
                prepared.leases.append(held)
            search = partial(self._search, items, held, prepared)
            # What a batch computes, the next one finds: else answers would depend on how many are in flight.
            if self._miss == "backoff":
                search()
                if prepared.searched is not None:
                    self._send(prepared.searched)
            else:
                prepared.search_later = search
        except Exception as error:
            self._fail(prepared, error, "prepare")
            self.discard(prepared)
        except BaseException:
            self.discard(prepared)
            raise
        prepared.seconds = time.perf_counter() - started
        return prepared

    @torch.no_grad()
    def compute(self, prepared: PreparedBatch) -> Callable[[], BatchResult]:
        """Computes what can be served of a prepared batch; the result, to be asked once, lets go of it.

        On the CPU all is done when this returns, and nothing held any more.
        """
        started = time.perf_counter()
        outputs: Callable[[], Outputs] = list
        try:
            if prepared.search_later is not None:
                with self._clock.waiting("compute"):
                    prepared.search_later()
            if prepared.searched is not None:
                with self._clock.working("compute", prepared.number):
                    outputs = self._compute(prepared.searched)
        except Exception as error:
            self._fail(prepared, error, "compute")
        except BaseException:
            self.discard(prepared)
            raise
        if self.is_asynchronous:
            return partial(self._finish, prepared, outputs, started)
        result = self._finish(prepared, outputs, started)
        return lambda: result

    def _finish(self, prepared: PreparedBatch, outputs: Callable[[], Outputs], started: float) -> BatchResult:
        """The result of a batch that has been computed since ``started``, when it is there."""
        try:
            if prepared.searched is not None:
                for index, output in zip(
                    prepared.searched.served,
                    self._wait(prepared, outputs),
                    strict=False,  # a batch that failed has none
                ):
                    prepared.outputs[index] = output
        except Exception as error:
            self._fail(prepared, error, "compute")
        finally:
            self.discard(prepared)
        finished = cast("Outputs", prepared.outputs)
        seconds = time.perf_counter() - started
        return BatchResult(finished, prepared.number, prepared.started, prepared.seconds, seconds)

    def _wait(self, prepared: PreparedBatch, outputs: Callable[[], Outputs]) -> Outputs:
        """Only for a device is this a stage."""
        if not self.is_asynchronous:
            return outputs()
        with self._clock.working("finish", prepared.number):
            return outputs()

    def discard(self, prepared: PreparedBatch) -> None:
        """Lets go of what a prepared batch holds; a second call does nothing."""
        searched, prepared.searched, prepared.search_later = prepared.searched, None, None
        if searched is not None:
            self._computer.release(searched)
        while prepared.leases:
            prepared.leases.pop().release()

    @staticmethod
    def _fail(prepared: PreparedBatch, error: Exception, stage: str) -> None:
        """Gives the items that have no output yet the error."""
        fault = as_fault(error, stage)
        prepared.outputs = [fault if output is None else output for output in prepared.outputs]

    def _search(
        self,
        items: Sequence[BatchItem],
        held: HeldTenants,
        prepared: PreparedBatch,
    ) -> None:
        with self._clock.working("search", prepared.number):
            prepared.searched = self._searched(items, held, prepared)

    def _searched(
        self,
        items: Sequence[BatchItem],
        held: HeldTenants,
        prepared: PreparedBatch,
    ) -> SearchedBatch | None:
        tenants = held.outcomes
        # A tenant that was replaced since its request was admitted may have another domain.
        domains = [each.info.domain for each in tenants if not isinstance(each, HmiError)]
        view, failed = self._read(domains)
        if view is not None:
            prepared.leases.append(view)
        prepared.outputs = [
            tenant if isinstance(tenant, HmiError) else failed.get(tenant.info.domain) for tenant in tenants
        ]
        served = [index for index, output in enumerate(prepared.outputs) if output is None]
        if not served:
            return None
        residents = [cast(ResidentTenant, tenants[index]) for index in served]
        sequences = PackedSequences.pack([items[index].input_ids for index in served])
        readout = Readout.select(sequences, [each.head.pooling in ("cls", "pooler") for each in residents])
        adapters = AdapterBatch(
            self._residency.arena.memory,
            self._residency.slots,
            residents,
            sequences.lengths,
            sequences.lengths if readout is None else readout.counts,
        )
        references = None
        if view is not None:
            references = self._look_up(sequences, [each.info.domain for each in residents], view)
        return SearchedBatch(
            number=prepared.number,
            served=served,
            tenants=residents,
            view=view,
            sequences=sequences,
            readout=readout,
            adapters=adapters,
            references=references,
            arrivals=held.arrivals,
        )

    def _read(self, domains: Sequence[str]) -> tuple[PlotView | None, dict[str, HmiError]]:
        """A lease on the domains' tables, and the domains whose tables cannot be read, with the reason."""
        if self._plots is None:
            return None, {}
        view, failed = self._plots.reading_each(domains)
        if self._miss != "backoff":
            unable = self._without_layers(view, [domain for domain in domains if domain not in failed])
            if unable:
                failed |= unable
                view.release()
                view, more = self._plots.reading_each([domain for domain in domains if domain not in failed])
                failed |= more
        return view, failed

    def _without_layers(self, view: PlotView, domains: Sequence[str]) -> dict[str, HmiError]:
        """Domains whose missing windows could not be computed, with the reason."""
        failed: dict[str, HmiError] = {}
        for domain in dict.fromkeys(domains):
            try:
                view.layers_of(self._model, view.identity_of(domain))
            except HmiError as error:
                failed[domain] = error
        return failed

    def _look_up(self, sequences: PackedSequences, domains: Sequence[str], view: PlotView) -> torch.Tensor:
        references = view.lookup(sequences, domains)
        self._count(sequences, references)
        if self._recorder is not None:
            self._recorder.record(sequences, domains, view.in_tables(references[:, 0]))
        return references

    def _compute(self, searched: SearchedBatch) -> Callable[[], Outputs]:
        if self._miss != "backoff":
            self._complete(searched)
            self._send(searched)
        return self._computer.launch(searched)

    def _send(self, searched: SearchedBatch) -> None:
        """Only where there is somewhere to send it is this a stage."""
        if self.is_asynchronous:
            with self._clock.working("send", searched.number):
                self._computer.send(searched)

    def _complete(self, searched: SearchedBatch) -> None:
        """Computes windows that are missing, all of them or as many as the budget lets."""
        sequences, view, domains = searched.sequences, searched.view, searched.domains
        if view is None or searched.references is None:
            return
        limit = None if self._budget is None else self._budget.grant(sequences.num_tokens)
        weights = partial(self._recorder.weights_of, domains=domains) if self._recorder else None
        searched.references, computed, skipped = view.compute_misses(
            self._model, sequences, domains, searched.references, limit=limit, weights=weights
        )
        if self._budget is not None:
            self._budget.spend(computed)
        self.plot_statistics.windows_computed += computed
        self.plot_statistics.budget_skipped += skipped

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
