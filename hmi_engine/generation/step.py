"""One step of a decoder: new tokens of many sequences, some of them prompts and some one token long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch

import hmi_kernels
from hmi_engine.errors import HmiError, UnknownTenantError
from hmi_engine.generation.sequence import DecoderSequence
from hmi_engine.generation.step_leases import StepLeases
from hmi_engine.generation.token_choice import NextToken
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.memory.causal_view import CausalPlotView, CausalTokens
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.memory.residency import AdapterResidency
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.tenant_reader import digest_of
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.pipeline.read_out import HeadOutput, read_out
from hmi_engine.pipeline.stage_clock import StageClock
from hmi_engine.pipeline.step import MissPolicy, PlotStatistics

__all__ = ["KeyValueCache", "Scheduled", "StepOutput", "StepRunner"]


class KeyValueCache:
    """Keys and values of the upper layers, in blocks; domain layers have none.

    Attributes:
        keys: per upper layer float32 [blocks, heads, d, block_size].
        values: per upper layer float32 [blocks, heads, block_size, d].
    """

    def __init__(self, general: GeneralInfo, num_blocks: int, block_size: int) -> None:
        """Reserves address space; the operating system gives pages as blocks are written."""
        heads, size = general.num_heads, general.hidden_size // general.num_heads
        self.block_size = block_size
        self.keys = [torch.empty(num_blocks, heads, size, block_size) for _ in general.upper_layers]
        self.values = [torch.empty(num_blocks, heads, block_size, size) for _ in general.upper_layers]

    @staticmethod
    def bytes_per_token(general: GeneralInfo) -> int:
        """What a token takes in all upper layers together."""
        return 2 * torch.float32.itemsize * general.hidden_size * general.num_upper_layers


@dataclass(frozen=True)
class Scheduled:
    """A sequence's part of a step: its next ``num_tokens`` tokens, for which it has blocks."""

    sequence: DecoderSequence
    num_tokens: int

    @property
    def is_complete(self) -> bool:
        """Whether all its tokens are in the cache after the step, so that it goes on or ends."""
        return self.num_tokens == self.sequence.num_waiting


StepOutput = NextToken | HeadOutput | HmiError | None
"""Of a text's next token, what a head says, an error, or None where a prompt goes on."""


class StepRunner:
    """Runs steps against one base model, its PLOT tables, the resident adapters and the cache. One thread."""

    def __init__(
        self,
        general: GeneralInfo,
        model: HierarchicalGpt2,
        plots: PlotLibrary | None,
        residency: AdapterResidency,
        cache: KeyValueCache,
        *,
        miss: MissPolicy,
        exact_budget: float,
        clock: StageClock | None = None,
    ) -> None:
        """Runs nothing yet; arguments as those of ``hmi_engine.pipeline.step.BatchRunner``."""
        self._general = general
        self._model = model
        self._leases = StepLeases(residency, plots, model, keep_tables=miss == "backoff")
        self._cache = cache
        self._miss = miss
        self._exact_budget = exact_budget
        self._clock = clock or StageClock()
        self._num_steps = 0
        self.plot_statistics = PlotStatistics()

    @torch.no_grad()
    def run(self, scheduled: Sequence[Scheduled]) -> list[StepOutput]:
        """Computes a step; sequences of one tenant should stand together. An error is its tenant's alone."""
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
        outputs: list[StepOutput] = [None] * len(scheduled)
        with self._clock.working("fetch", self._num_steps):
            residents = self._leases.residents([each.sequence.tenant for each in scheduled])
        served = []
        for index, resident in enumerate(residents):
            problem = _find_problem(scheduled[index].sequence, resident)
            if problem is not None:
                outputs[index] = problem
            else:
                served.append(index)
        if not served:
            return outputs
        chosen = [scheduled[index] for index in served]
        tenants = [cast(ResidentTenant, residents[index]) for index in served]
        with self._clock.working("search", self._num_steps):
            tokens = self._tokens(chosen, tenants)
            view, references = self._search(tokens)
        with self._clock.working("compute", self._num_steps):
            computed = self._compute(chosen, tenants, tokens, view, references)
        for index, output in zip(served, computed, strict=True):
            outputs[index] = output
        return outputs

    def _tokens(self, scheduled: Sequence[Scheduled], tenants: Sequence[ResidentTenant]) -> CausalTokens:
        width = self._general.window
        windows: list[int] = []  # one after another: a list of lists becomes a tensor more slowly
        input_ids: list[int] = []
        positions: list[int] = []
        domains: list[str] = []
        for each, tenant in zip(scheduled, tenants, strict=True):
            sequence, start = each.sequence, each.sequence.num_computed
            end = start + each.num_tokens
            for index in range(start, end):
                windows += sequence.window(index, width)
            input_ids += sequence.token_ids[start:end]
            positions += range(start, end)
            domains += [tenant.info.domain] * each.num_tokens
        return CausalTokens(
            torch.tensor(windows, dtype=torch.int32).view(-1, 3),
            torch.tensor(input_ids, dtype=torch.int32),
            torch.tensor(positions, dtype=torch.int64),
            domains,
        )

    def _search(self, tokens: CausalTokens) -> tuple[CausalPlotView | None, torch.Tensor | None]:
        view = self._leases.tables(tokens.domains)
        if view is None:
            return None, None
        references = view.lookup(tokens)
        statistics = self.plot_statistics
        statistics.tokens += len(references)
        statistics.windows += int((tokens.windows[:, 1] >= 0).sum())
        statistics.window_hits += int((references[:, 0] >= 0).sum())
        statistics.bigram_backoffs += int((references[:, 1] >= 0).sum())
        if self._miss != "backoff":
            limit = int(self._exact_budget * len(references)) if self._miss == "budget" else None
            references, computed = view.compute_misses(tokens, references, limit=limit)
            statistics.windows_computed += computed
        return view, references

    # Under no_grad alone each op of ours would go through autograd's wrapper in Python, a third of its time.
    @torch.inference_mode()
    def _compute(
        self,
        scheduled: Sequence[Scheduled],
        tenants: Sequence[ResidentTenant],
        tokens: CausalTokens,
        view: CausalPlotView | None,
        references: torch.Tensor | None,
    ) -> list[StepOutput]:
        counts = [each.num_tokens for each in scheduled]
        adapters = self._leases.adapters(tenants, counts)
        if view is None or references is None:
            hidden_states = self._model.embed(tokens.input_ids, tokens.positions)
        else:
            hidden_states = view.merge(tokens, references)
        attention = _PagedAttention(self._cache, self._general, scheduled)
        hidden_states = self._model.run_layers(
            hidden_states, attention, first=self._general.plot_layers, adapters=adapters
        )
        return self._read(scheduled, tenants, hidden_states)

    def _read(
        self, scheduled: Sequence[Scheduled], tenants: Sequence[ResidentTenant], hidden_states: torch.Tensor
    ) -> list[StepOutput]:
        """Logits or head outputs of the sequences whose tokens are all in the cache now."""
        ends = [end - 1 for end in accumulate(each.num_tokens for each in scheduled)]
        complete = [index for index, each in enumerate(scheduled) if each.is_complete]
        outputs: list[StepOutput] = [None] * len(scheduled)
        last = hidden_states[torch.tensor([ends[index] for index in complete], dtype=torch.int64)]
        texts = [i for i, index in enumerate(complete) if scheduled[index].sequence.is_generating]
        if texts:
            logits = self._model.logits(last if len(texts) == len(complete) else last[texts])
            # All at once: a call for each text would take longer than a small model's layer.
            likeliest = logits.argmax(-1).tolist()
            for i, row, token in zip(texts, logits.unbind(), likeliest, strict=True):
                outputs[complete[i]] = NextToken(row, token)
        others = [i for i, index in enumerate(complete) if not scheduled[index].sequence.is_generating]
        if others:
            states = self._model.final_norm(last[others]).split(1)
            of_heads = read_out([tenants[complete[i]] for i in others], states, self._model.pooler)
            for i, output in zip(others, of_heads, strict=True):
                outputs[complete[i]] = output
        return outputs


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


class _PagedAttention:
    """Attention of a step's tokens over the cache; a ``hmi_engine.models.gpt2_block.Attend``."""

    def __init__(self, cache: KeyValueCache, general: GeneralInfo, scheduled: Sequence[Scheduled]) -> None:
        self._cache = cache
        self._first = general.plot_layers
        sequences = [each.sequence for each in scheduled]
        width = max(len(sequence.blocks) for sequence in sequences)
        tables: list[int] = []
        for sequence in sequences:
            tables += sequence.blocks + [-1] * (width - len(sequence.blocks))
        self._tables = torch.tensor(tables, dtype=torch.int32).view(-1, width)
        self._offsets = torch.tensor([0, *accumulate(each.num_tokens for each in scheduled)])
        self._lengths = torch.tensor([each.sequence.num_computed + each.num_tokens for each in scheduled])

    def __call__(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        place = layer - self._first
        return hmi_kernels.paged_attention(
            query,
            key,
            value,
            self._cache.keys[place],
            self._cache.values[place],
            self._tables,
            self._offsets,
            self._lengths,
        )
