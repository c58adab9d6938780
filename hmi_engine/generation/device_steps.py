"""Computes the steps of a decoder on a device: what a step needs is sent there, what it gives comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.errors import HmiError
from hmi_engine.generation.cache import BlockTables, KeyValueCache, PagedAttention
from hmi_engine.generation.decode_graphs import DecodeGraphs
from hmi_engine.generation.shared_prefixes import SharedPrefixes
from hmi_engine.generation.step_compute import LayerSpan, SearchedStep, StepOutput, StepReadout, run_spans
from hmi_engine.generation.token_choice import NextToken
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.memory.adapter_batch import AdapterBatch
from hmi_engine.memory.causal_view import CausalMergeInputs, merge_causal_rows
from hmi_engine.memory.device_rows import DeviceRows
from hmi_engine.memory.streams import DeviceStreams
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.pipeline.arriving_adapters import ArrivingAdapters
from hmi_engine.pipeline.device_buffers import BatchSlot, StagedBuffer
from hmi_engine.pipeline.read_out import HeadOutput, read_out, with_own_values
from hmi_engine.pipeline.stage_clock import StageClock

__all__ = ["DeviceSteps"]

_ID_ELEMENTS = torch.int64.itemsize // torch.float32.itemsize


@dataclass
class _Sent:
    """A step's inputs as they are on the device, or on their way; ``tables`` unless a graph has them."""

    input_ids: Tensor
    positions: Tensor
    text_rows: Tensor
    head_rows: Tensor
    drawn: Tensor
    merge: CausalMergeInputs | None
    tables: BlockTables | None


class _SentSpan(NamedTuple):
    """A span's layers and tokens, with what they need on the device."""

    span: LayerSpan
    tables: BlockTables
    adapters: AdapterBatch


class _Read(NamedTuple):
    """What a step's rows gave, on the device: texts' logits [n, V], their likeliest tokens, and heads."""

    logits: Tensor
    likeliest: Tensor
    of_heads: Sequence[HeadOutput | HmiError]


class DeviceSteps:
    """Runs one step after another, as the next one's tokens are what this one gives.

    ``copy`` brings adapters; ``gather`` brings inputs and PLOT rows, and merges the rows; ``compute`` runs
    each layer when its input and its own adapters are there, then the heads, and copies what they gave back.
    The segments of the adapters stay on the device while the same texts are under way. Steps that give each
    text a token are graphs, where there are such.
    """

    def __init__(
        self,
        general: GeneralInfo,
        model: HierarchicalGpt2,
        streams: DeviceStreams,
        rows: DeviceRows,
        cache: KeyValueCache,
        clock: StageClock,
        shared: SharedPrefixes | None,
        *,
        uses_graphs: bool,
    ) -> None:
        """``model`` and ``cache`` lie on the device of ``streams``; other memory is taken when needed.

        ``shared`` are the beginnings of the cache's prompts, if any are kept.
        """
        streams.synchronize()  # some of the model's weights were put together on another stream
        self._general, self._model, self._cache = general, model, cache
        self._streams, self._rows, self._clock = streams, rows, clock
        self._slot = BatchSlot(streams)
        self._adapter_tables = StagedBuffer(streams)
        self._shared = shared
        self._span_tables: list[StagedBuffer] = []
        self._adapters: tuple[AdapterBatch, AdapterBatch] | None = None
        self._graphs = DecodeGraphs(general, model, streams, cache) if uses_graphs else None

    @torch.inference_mode()
    def run(self, step: SearchedStep) -> list[StepOutput]:
        """See :meth:`hmi_engine.generation.step_compute.StepCompute.run`."""
        try:
            return self._run(step)
        except BaseException:
            self._adapters = None
            if self._graphs is not None:
                self._graphs.forget()
            self._streams.synchronize()  # nothing of the step may be in use when the next one begins
            raise

    def _run(self, step: SearchedStep) -> list[StepOutput]:
        readout, whole = StepReadout.of(step.scheduled), step.spans[-1]
        tables = step.block_tables(whole)
        graphs = self._graphs_for(step, readout)
        if graphs is not None and graphs.send(tables, whole.adapters):
            sent = self._send(step, readout, None)
            hidden_states = self._enter(sent)
            ArrivingAdapters(self._streams, step.arrivals, self._clock).before_heads()
            return self._finish(step, readout, sent, _Read(*graphs.run(hidden_states), []))
        sent = self._send(step, readout, tables)
        assert sent.tables is not None  # no graph has them
        spans = [
            *self._send_spans(step),
            _SentSpan(whole, sent.tables, self._send_adapters(whole.adapters)),
        ]
        hidden_states = self._run_layers(step, self._enter(sent), spans)
        return self._finish(step, readout, sent, self._read(step, readout, sent, hidden_states))

    def _graphs_for(self, step: SearchedStep, readout: StepReadout) -> DecodeGraphs | None:
        """The graphs, for a step that gives each of its sequences a token."""
        count = len(step.scheduled)
        if self._graphs is None or not self._graphs.takes(count):
            return None
        is_decoding = len(step.tokens.input_ids) == count == len(readout.texts)
        return self._graphs if is_decoding else None

    def _send(self, step: SearchedStep, readout: StepReadout, tables: BlockTables | None) -> _Sent:
        """Copies all small inputs at once, and the rows of tables that do not lie on the device."""
        merge = None
        if step.view is not None and step.references is not None:
            merge = step.view.merge_inputs(step.tokens, step.references)
            merge = self._rows.bring(merge, self._slot.rows.lay_out)
        rows_read = (readout.text_rows, readout.head_rows, readout.drawn)
        tensors = iter(
            self._slot.inputs.upload(
                [
                    step.tokens.input_ids,
                    step.tokens.positions,
                    *(torch.tensor(rows, dtype=torch.int64) for rows in rows_read),
                    *(tables or ()),
                    *([] if merge is None else [merge.references, merge.unigrams_of_tokens]),
                ]
            )
        )
        input_ids, positions, text_rows, head_rows, drawn = islice(tensors, 5)
        if tables is not None:
            tables = BlockTables(*islice(tensors, len(tables)))
        if merge is not None:
            self._slot.rows.send()
            merge = merge._replace(
                input_ids=input_ids,
                positions=positions,
                references=next(tensors),
                unigrams_of_tokens=next(tensors),
            )
        return _Sent(input_ids, positions, text_rows, head_rows, drawn, merge, tables)

    def _enter(self, sent: _Sent) -> Tensor:
        """The input of the first upper layer, for which ``compute`` waits, and for all that was sent."""
        with self._streams.on("gather"):
            if sent.merge is None:
                hidden_states = self._model.embed(sent.input_ids, sent.positions)
            else:
                hidden_states = merge_causal_rows(self._model, sent.merge)
        self._streams.wait("compute", self._streams.record("gather"))
        return hidden_states

    def _send_spans(self, step: SearchedStep) -> list[_SentSpan]:
        """What the spans before the last need."""
        early = step.spans[:-1]
        while len(self._span_tables) < len(early):
            self._span_tables.append(StagedBuffer(self._streams))
        sent = []
        for span, memory in zip(early, self._span_tables, strict=False):
            tables = step.block_tables(span)
            tensors = iter(memory.upload([*tables, *span.adapters.tensors()]))
            tables = BlockTables(*islice(tensors, len(tables)))
            sent.append(_SentSpan(span, tables, span.adapters.with_tensors(tensors)))
        return sent

    def _run_layers(self, step: SearchedStep, hidden_states: Tensor, spans: Sequence[_SentSpan]) -> Tensor:
        """The upper layers, each when its adapters are there."""
        arriving = ArrivingAdapters(self._streams, step.arrivals, self._clock)

        def run_span(number: int, hidden_states: Tensor) -> Tensor:
            span, tables, adapters = spans[number]
            return self._model.run_layers(
                hidden_states,
                PagedAttention(self._cache, tables, self._model.plot_layers),
                first=span.first,
                last=span.last,
                adapters=adapters,
                around_layer=arriving.before_layer,
            )

        with self._streams.on("compute"):
            hidden_states = run_spans(step, self._shared, hidden_states, run_span)
        arriving.before_heads()
        return hidden_states

    def _send_adapters(self, adapters: AdapterBatch) -> AdapterBatch:
        """The segments on the device, copied where they are not those of the step before."""
        if self._adapters is None or self._adapters[0] is not adapters:
            tensors = iter(self._adapter_tables.upload(adapters.tensors()))
            self._adapters = adapters, adapters.with_tensors(tensors)
        return self._adapters[1]

    def _read(self, step: SearchedStep, readout: StepReadout, sent: _Sent, hidden_states: Tensor) -> _Read:
        """Reads the rows that somebody asks for."""
        tenants = [step.tenants[index] for index in readout.heads]
        with self._streams.on("compute"):
            logits = self._model.logits(hidden_states[sent.text_rows])
            of_heads: Sequence[HeadOutput | HmiError] = []
            if tenants:
                states = self._model.final_norm(hidden_states[sent.head_rows]).float().split(1)
                of_heads = read_out(tenants, states, self._model.pooler)
            return _Read(logits, logits.argmax(-1), of_heads)

    def _finish(self, step: SearchedStep, readout: StepReadout, sent: _Sent, read: _Read) -> list[StepOutput]:
        """Copies what the rows gave to the host, by two copies, and waits for it."""
        num_texts, vocabulary = len(readout.texts), self._general.vocab_size
        with self._streams.on("compute"):
            drawn = read.logits[sent.drawn].float()
            values = [each.values for each in read.of_heads if isinstance(each, HeadOutput)]
            floats = torch.cat([each.reshape(-1) for each in (drawn, *values)])
            host = self._slot.results(_ID_ELEMENTS * num_texts + floats.numel())
            ids = host[: _ID_ELEMENTS * num_texts].view(torch.int64)
            ids.copy_(read.likeliest, non_blocking=True)
            host[_ID_ELEMENTS * num_texts :].copy_(floats, non_blocking=True)
        self._streams.record("compute").synchronize()
        hmi_kernels.raise_faults(self._streams.device.index or 0)
        # What is kept outlives the step; the slot's memory is the next one's.
        of_drawn, of_heads = host[_ID_ELEMENTS * num_texts :].tensor_split([vocabulary * len(readout.drawn)])
        rows = dict(zip(readout.drawn, of_drawn.clone().view(-1, vocabulary), strict=True))
        outputs: list[StepOutput] = [None] * len(step.scheduled)
        for place, (index, token) in enumerate(zip(readout.texts, ids.tolist(), strict=True)):
            outputs[index] = NextToken(rows.get(place), token)
        for index, output in zip(readout.heads, with_own_values(read.of_heads, of_heads), strict=True):
            outputs[index] = output
        return outputs
