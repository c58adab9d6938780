"""What computes a step of a decoder: layers, language head and tenants' heads. Here: the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Protocol

import torch
from torch.nn import functional

import hmi_kernels
from hmi_engine.errors import HmiError
from hmi_engine.generation.cache import BlockTables, KeyValueCache, PagedAttention
from hmi_engine.generation.sequence import DecoderSequence
from hmi_engine.generation.shared_prefixes import SharedPiece, SharedPrefixes
from hmi_engine.generation.token_choice import NextToken
from hmi_engine.memory.adapter_batch import AdapterBatch
from hmi_engine.memory.causal_view import CausalPlotView, CausalTokens
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.streams import Arrival
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.models.linear import rounded_rows
from hmi_engine.pipeline.read_out import HeadOutput, read_out
from hmi_engine.pipeline.stage_clock import StageClock

__all__ = [
    "HostSteps",
    "LayerSpan",
    "Scheduled",
    "SearchedStep",
    "StepCompute",
    "StepOutput",
    "StepReadout",
    "run_spans",
]


@dataclass(frozen=True)
class Scheduled:
    """A sequence's part of a step: its next ``num_tokens`` tokens, for which it has blocks.

    The first of them may be known up to some layer, as ``piece`` says.
    """

    sequence: DecoderSequence
    num_tokens: int
    piece: SharedPiece | None = None

    @property
    def num_known(self) -> int:
        """Tokens that enter at a later layer than the others."""
        return 0 if self.piece is None else self.piece.num_known_tokens

    def num_tokens_at(self, layer: int) -> int:
        """Tokens that go through a layer."""
        has_entered = self.piece is None or self.piece.layer <= layer
        return self.num_tokens if has_entered else self.num_tokens - self.num_known

    @property
    def is_complete(self) -> bool:
        """Whether all its tokens are in the cache after the step, so that it goes on or ends."""
        return self.num_tokens == self.sequence.num_waiting


StepOutput = NextToken | HeadOutput | HmiError | None
"""Of a text's next token, what a head says, an error, or None where a prompt goes on."""


@dataclass(frozen=True)
class LayerSpan:
    """Layers through which the same tokens of a step go.

    Attributes:
        first: the first of the layers.
        last: the one behind the last.
        token_counts: of each sequence its tokens that go through, its last ones.
        adapters: what the layers apply.
    """

    first: int
    last: int
    token_counts: Sequence[int]
    adapters: AdapterBatch


@dataclass(frozen=True)
class SearchedStep:
    """What a step needs to be computed.

    Attributes:
        scheduled: the sequences, those of a tenant together.
        tenants: of each, its tenant.
        tokens: their new tokens but those that are known, in host memory like all that follows.
        view: the lease on their domains' tables, and ``references`` int64 [T, 2] into them; None where no
            layers are looked up.
        spans: the upper layers; through those of the last span all tokens go.
        arrivals: what brings tenants that are still on their way to the device.
    """

    scheduled: Sequence[Scheduled]
    tenants: Sequence[ResidentTenant]
    tokens: CausalTokens
    view: CausalPlotView | None
    references: torch.Tensor | None
    spans: Sequence[LayerSpan]
    arrivals: Sequence[Arrival]

    @property
    def pieces(self) -> list[SharedPiece | None]:
        """What of each sequence is known, or will be."""
        return [each.piece for each in self.scheduled]

    def block_tables(self, span: LayerSpan) -> BlockTables:
        """Where the sequences have the tokens of a span in the cache."""
        lengths = [each.sequence.num_computed + each.num_tokens for each in self.scheduled]
        return BlockTables.of([each.sequence.blocks for each in self.scheduled], span.token_counts, lengths)


@dataclass(frozen=True)
class StepReadout:
    """Which of a step's rows somebody reads: the last ones of sequences that are complete after it.

    Attributes:
        texts: of sequences that generate, by their places in the step; ``text_rows`` are their rows.
        heads: of sequences that a tenant's head reads; ``head_rows`` likewise.
        drawn: which of ``texts`` need their logits, being more than the likeliest token's text.
    """

    texts: list[int]
    text_rows: list[int]
    heads: list[int]
    head_rows: list[int]
    drawn: list[int]

    @classmethod
    def of(cls, scheduled: Sequence[Scheduled]) -> StepReadout:
        """What a step's sequences are asked for."""
        ends = [end - 1 for end in accumulate(each.num_tokens for each in scheduled)]
        complete = [index for index, each in enumerate(scheduled) if each.is_complete]
        texts = [index for index in complete if scheduled[index].sequence.is_generating]
        heads = [index for index in complete if not scheduled[index].sequence.is_generating]
        choosers = [scheduled[index].sequence.chooser for index in texts]
        return cls(
            texts,
            [ends[index] for index in texts],
            heads,
            [ends[index] for index in heads],
            [place for place, chooser in enumerate(choosers) if chooser is None or chooser.needs_logits],
        )


class StepCompute(Protocol):
    """Computes steps, on the device that it was made for. For one thread."""

    def run(self, step: SearchedStep) -> list[StepOutput]:
        """What each of the step's sequences gets; all is in host memory, and the step at its end."""


def run_spans(
    step: SearchedStep,
    shared: SharedPrefixes | None,
    hidden_states: torch.Tensor,
    run_span: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """All upper layers: [tokens that are not known, H] -> [all tokens, H].

    ``run_span`` runs those of the span of a number: hidden states [T, H] -> [T, H]. Where one begins, what is
    known enters, and what was not known is kept in ``shared``.
    """
    if shared is not None and len(step.spans) > 1:
        shared.write_known(step.pieces)
    for number, span in enumerate(step.spans):
        if number and shared is not None:
            counts = step.spans[number - 1].token_counts
            hidden_states = shared.enter(step.pieces, counts, hidden_states, span.first)
        hidden_states = run_span(number, hidden_states)
    return hidden_states


class HostSteps:
    """Computes on the CPU."""

    def __init__(
        self,
        model: HierarchicalGpt2,
        cache: KeyValueCache,
        clock: StageClock,
        shared: SharedPrefixes | None,
    ) -> None:
        """``cache`` lies in host memory; ``shared`` are its prompts' beginnings, if any are kept."""
        self._model, self._cache, self._clock, self._shared = model, cache, clock, shared
        hmi_kernels.keep_freed_memory()

    # Under no_grad alone each op of ours would go through autograd's wrapper in Python, a third of its time.
    @torch.inference_mode()
    def run(self, step: SearchedStep) -> list[StepOutput]:
        """See :meth:`StepCompute.run`."""
        tokens = step.tokens
        if step.view is None or step.references is None:
            hidden_states = self._model.embed(tokens.input_ids, tokens.positions)
        else:
            hidden_states = step.view.merge(tokens, step.references)
        return self._read(step, run_spans(step, self._shared, hidden_states, partial(self._run_span, step)))

    def _run_span(self, step: SearchedStep, number: int, hidden_states: torch.Tensor) -> torch.Tensor:
        span, count = step.spans[number], len(hidden_states)
        tables = step.block_tables(span)
        spare = rounded_rows(count) - count
        if 0 < spare <= self._cache.block_size:  # so that products come in few sizes
            hidden_states = functional.pad(hidden_states, (0, 0, 0, spare))
            tables = tables.with_spare(spare, self._cache.spare_block)
        hidden_states = self._model.run_layers(
            hidden_states,
            PagedAttention(self._cache, tables, self._model.plot_layers),
            first=span.first,
            last=span.last,
            adapters=span.adapters,
            around_layer=self._clock.around_layer,
        )
        return hidden_states[:count]

    def _read(self, step: SearchedStep, hidden_states: torch.Tensor) -> list[StepOutput]:
        readout = StepReadout.of(step.scheduled)
        outputs: list[StepOutput] = [None] * len(step.scheduled)
        if readout.texts:
            logits = self._model.logits(hidden_states[torch.tensor(readout.text_rows)])
            # All at once: a call for each text would take longer than a small model's layer.
            likeliest = logits.max(-1).indices.tolist()  # argmax takes three times as long
            rows = {place: logits[place] for place in readout.drawn}
            for place, (index, token) in enumerate(zip(readout.texts, likeliest, strict=True)):
                outputs[index] = NextToken(rows.get(place), token)
        if readout.heads:
            states = self._model.final_norm(hidden_states[torch.tensor(readout.head_rows)]).split(1)
            tenants = [step.tenants[index] for index in readout.heads]
            for index, output in zip(
                readout.heads, read_out(tenants, states, self._model.pooler), strict=True
            ):
                outputs[index] = output
        return outputs
