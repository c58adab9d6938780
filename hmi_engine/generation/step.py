"""One step of a decoder: new tokens of many sequences, some of them prompts and some one token long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import cast

import torch

from hmi_engine.errors import HmiError, UnknownTenantError
from hmi_engine.generation.sequence import DecoderSequence
from hmi_engine.generation.shared_prefixes import SharedPrefixes
from hmi_engine.generation.step_compute import (
    LayerSpan,
    Scheduled,
    SearchedStep,
    StepCompute,
    StepOutput,
)
from hmi_engine.generation.step_leases import StepLeases
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.memory.causal_view import CausalPlotView, CausalTokens
from hmi_engine.memory.missing_windows import WindowBudget
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.memory.residency import AdapterResidency
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.tenant_reader import digest_of
from hmi_engine.memory.traffic import TrafficRecorder
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.pipeline.stage_clock import StageClock
from hmi_engine.pipeline.step import MissPolicy, PlotStatistics

__all__ = ["StepRunner"]


class StepRunner:
    """Runs steps against the PLOT tables, the resident adapters and what computes. For one thread."""

    def __init__(
        self,
        general: GeneralInfo,
        model: HierarchicalGpt2,
        plots: PlotLibrary | None,
        residency: AdapterResidency,
        computer: StepCompute,
        *,
        miss: MissPolicy,
        exact_budget: float,
        recorder: TrafficRecorder | None = None,
        shared: SharedPrefixes | None = None,
        clock: StageClock | None = None,
    ) -> None:
        """Runs nothing yet; arguments as those of ``hmi_engine.pipeline.step.BatchRunner``.

        ``recorder`` knows what traffic asked for, which a budget goes by; steps do not count it themselves.
        ``shared`` are the beginnings of prompts that ``computer`` keeps, if it keeps any.
        """
        self._general = general
        self._leases = StepLeases(residency, plots, model, keep_tables=miss == "backoff")
        self._computer = computer
        self._miss = miss
        self._budget = WindowBudget(exact_budget) if miss == "budget" else None
        self._recorder = recorder
        self._shared = shared
        self._clock = clock or StageClock()
        self._num_steps = 0
        self.plot_statistics = PlotStatistics()

    @torch.no_grad()
    def run(self, scheduled: Sequence[Scheduled]) -> list[StepOutput]:
        """Computes a step; sequences of one tenant should stand together.

        A tenant that cannot be had, or whose domain cannot, is the error of its sequences alone; what is
        raised is the whole step's.
        """
        self._num_steps += 1
        try:
            return self._run(scheduled)
        except BaseException:
            self.rest()
            raise

    def rest(self) -> None:
        """Gives back what is held for a next step, as there is none for now."""
        self._leases.release()

    def _run(self, scheduled: Sequence[Scheduled]) -> list[StepOutput]:
        with self._clock.working("fetch", self._num_steps):
            residents = self._leases.residents([each.sequence.tenant for each in scheduled])
        outputs: list[StepOutput] = [
            _find_problem(each.sequence, resident)
            for each, resident in zip(scheduled, residents, strict=True)
        ]
        with self._clock.working("search", self._num_steps):
            view = self._lease_tables(residents, outputs)
            served = [index for index, output in enumerate(outputs) if output is None]
            if not served:
                return outputs
            tenants = [cast(ResidentTenant, residents[index]) for index in served]
            step = self._searched([scheduled[index] for index in served], tenants, view)
        with self._clock.working("compute", self._num_steps):
            computed = self._computer.run(step)
        for index, output in zip(served, computed, strict=True):
            outputs[index] = output
        return outputs

    def _lease_tables(
        self, residents: Sequence[ResidentTenant | HmiError], outputs: list[StepOutput]
    ) -> CausalPlotView | None:
        """The tables for all who have no output yet; who cannot have theirs gets the error as output."""
        domains = {
            index: cast(ResidentTenant, residents[index]).info.domain
            for index, output in enumerate(outputs)
            if output is None
        }
        if not domains:
            return None
        view, failed = self._leases.tables(list(domains.values()))
        for index, domain in domains.items():
            outputs[index] = failed.get(domain)
        return view

    def _searched(
        self, scheduled: list[Scheduled], tenants: Sequence[ResidentTenant], view: CausalPlotView | None
    ) -> SearchedStep:
        scheduled = self._with_pieces(scheduled, tenants)
        tokens = self._tokens(scheduled, tenants)
        return SearchedStep(
            scheduled=scheduled,
            tenants=tenants,
            tokens=tokens,
            view=view,
            references=None if view is None else self._look_up(tokens, view),
            spans=self._spans(scheduled, tenants),
            arrivals=self._leases.arrivals,
        )

    def _with_pieces(self, scheduled: list[Scheduled], tenants: Sequence[ResidentTenant]) -> list[Scheduled]:
        """With what is known of each sequence's tokens below its tenant's first layer."""
        shared = self._shared
        if shared is None:
            return scheduled
        with_pieces = []
        for each, tenant in zip(scheduled, tenants, strict=True):
            piece = shared.piece(each.sequence, each.num_tokens, tenant.first_layer)
            with_pieces.append(each if piece is None else replace(each, piece=piece))
        return with_pieces

    def _spans(self, scheduled: Sequence[Scheduled], tenants: Sequence[ResidentTenant]) -> list[LayerSpan]:
        """The upper layers, parted where known tokens enter and where others are to be kept."""
        general = self._general
        pieces = [each.piece for each in scheduled]
        parted = sorted({piece.layer for piece in pieces if piece is not None})
        bounds = [general.plot_layers, *parted, general.num_layers]
        whole = [each.num_tokens for each in scheduled]
        adapters = self._leases.adapters(tenants, whole)
        spans = []
        for first, last in pairwise(bounds):
            counts = [each.num_tokens_at(first) for each in scheduled]
            batch = adapters if counts == whole else self._leases.new_adapters(tenants, counts)
            spans.append(LayerSpan(first, last, counts, batch))
        return spans

    def _tokens(self, scheduled: Sequence[Scheduled], tenants: Sequence[ResidentTenant]) -> CausalTokens:
        width = self._general.window
        windows: list[int] = []  # one after another: a list of lists becomes a tensor more slowly
        input_ids: list[int] = []
        positions: list[int] = []
        domains: list[str] = []
        for each, tenant in zip(scheduled, tenants, strict=True):
            sequence, start = each.sequence, each.sequence.num_computed + each.num_known
            end = each.sequence.num_computed + each.num_tokens
            for index in range(start, end):
                windows += sequence.window(index, width)
            input_ids += sequence.token_ids[start:end]
            positions += range(start, end)
            domains += [tenant.info.domain] * (end - start)
        return CausalTokens(
            torch.tensor(windows, dtype=torch.int32).view(-1, 3),
            torch.tensor(input_ids, dtype=torch.int32),
            torch.tensor(positions, dtype=torch.int64),
            domains,
        )

    def _look_up(self, tokens: CausalTokens, view: CausalPlotView) -> torch.Tensor:
        with torch.inference_mode():  # see HostSteps
            references = view.lookup(tokens)
        statistics = self.plot_statistics
        statistics.tokens += len(references)
        statistics.windows += int((tokens.windows[:, 1] >= 0).sum())
        statistics.window_hits += int((references[:, 0] >= 0).sum())
        statistics.bigram_backoffs += int((references[:, 1] >= 0).sum())
        if self._miss == "backoff":
            return references
        limit = None if self._budget is None else self._budget.grant(len(references))
        weights = partial(self._recorder.weights_of, domains=tokens.domains) if self._recorder else None
        completed = view.compute_misses(tokens, references, limit=limit, weights=weights)
        if self._budget is not None:
            self._budget.spend(completed.computed)
        statistics.windows_computed += completed.computed
        statistics.budget_skipped += completed.skipped
        return completed.references


def _find_problem(sequence: DecoderSequence, resident: ResidentTenant | HmiError) -> HmiError | None:
    """Why a sequence cannot go on."""
    if isinstance(resident, HmiError):
        return resident
    if digest_of(resident.info) != digest_of(sequence.tenant):
        # Its weights left memory and were replaced in the store: the cache holds what the old ones made.
        return UnknownTenantError(
            f"tenant {sequence.tenant.name!r} was replaced while a request of it ran; send it again"
        )
    return None
