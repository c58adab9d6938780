"""Computes the steps of a decoder on a device: what a step needs is sent there, what it gives comes back."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.errors import HmiError
from hmi_engine.generation.cache import BlockTables, KeyValueCache, PagedAttention
from hmi_engine.generation.step_compute import SearchedStep, StepOutput, StepReadout
from hmi_engine.generation.token_choice import NextToken
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.memory.adapter_batch import AdapterBatch
from hmi_engine.memory.causal_view import CausalMergeInputs, merge_causal_rows
from hmi_engine.memory.device_rows import DeviceRows
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.streams import Arrival, DeviceStreams
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.pipeline.device_buffers import BatchSlot, StagedBuffer
from hmi_engine.pipeline.read_out import HeadOutput, read_out
from hmi_engine.pipeline.stage_clock import StageClock

__all__ = ["DeviceSteps"]

_ID_ELEMENTS = torch.int64.itemsize // torch.float32.itemsize


@dataclass
class _Sent:
    """A step's inputs as they are on the device, or on their way there."""

    input_ids: Tensor
    positions: Tensor
    tables: BlockTables
    text_rows: Tensor
    head_rows: Tensor
    drawn: Tensor
    merge: CausalMergeInputs | None


class DeviceSteps:
    """Runs one step after another, as the next one's tokens are what this one gives.

    ``copy`` brings adapters; ``gather`` brings inputs and PLOT rows, and merges the rows; ``compute`` runs
    each layer when its input and its own adapters are there, then the heads, and copies what they gave back.
    The segments of the adapters stay on the device while the same texts are under way.
    """

    def __init__(
        self,
        general: GeneralInfo,
        model: HierarchicalGpt2,
        streams: DeviceStreams,
        rows: DeviceRows,
        cache: KeyValueCache,
        clock: StageClock,
    ) -> None:
        """``model`` and ``cache`` lie on the device of ``streams``; other memory is taken when needed."""
        streams.synchronize()  # some of the model's weights were put together on another stream
        self._general, self._model, self._cache = general, model, cache
        self._streams, self._rows, self._clock = streams, rows, clock
        self._slot = BatchSlot(streams)
        self._adapter_tables = StagedBuffer(streams)
        self._adapters: tuple[AdapterBatch, AdapterBatch] | None = None

    @torch.inference_mode()
    def run(self, step: SearchedStep) -> list[StepOutput]:
        """See :meth:`hmi_engine.generation.step_compute.StepCompute.run`."""
        try:
            return self._run(step)
        except BaseException:
            self._adapters = None
            self._streams.synchronize()  # nothing of the step may be in use when the next one begins
            raise

    def _run(self, step: SearchedStep) -> list[StepOutput]:
        readout = StepReadout.of(step.scheduled)
        sent = self._send(step, readout)
        adapters = self._send_adapters(step.adapters)
        with self._streams.on("gather"):
            if sent.merge is None:
                hidden_states = self._model.embed(sent.input_ids, sent.positions)
            else:
                hidden_states = merge_causal_rows(self._model, sent.merge)
        self._streams.wait("compute", self._streams.record("gather"))
        first = self._general.plot_layers
        with self._streams.on("compute"):
            hidden_states = self._model.run_layers(
                hidden_states,
                PagedAttention(self._cache, sent.tables, first),
                first=first,
                adapters=adapters,
                around_layer=partial(self._before_layer, step.arrivals),
            )
        for arrival in step.arrivals:
            self._streams.wait("compute", arrival.everything)
        return self._read(step, readout, sent, hidden_states)

    def _send(self, step: SearchedStep, readout: StepReadout) -> _Sent:
        """Copies all small inputs at once, and the rows of tables that do not lie on the device."""
        merge = None
        if step.view is not None and step.references is not None:
            merge = step.view.merge_inputs(step.tokens, step.references)
            merge = self._rows.bring(merge, self._slot.rows.lay_out)
        rows_read = (readout.text_rows, readout.head_rows, readout.drawn)
        tensors = [
            step.tokens.input_ids,
            step.tokens.positions,
            *step.block_tables(),
            *(torch.tensor(rows, dtype=torch.int64) for rows in rows_read),
            *([] if merge is None else [merge.references, merge.unigrams_of_tokens]),
        ]
        input_ids, positions, blocks, offsets, lengths, texts, heads, drawn, *of_merge = (
            self._slot.inputs.upload(tensors)
        )
        if merge is not None:
            self._slot.rows.send()
            merge = merge._replace(
                input_ids=input_ids,
                positions=positions,
                references=of_merge[0],
                unigrams_of_tokens=of_merge[1],
            )
        tables = BlockTables(blocks, offsets, lengths)
        return _Sent(input_ids, positions, tables, texts, heads, drawn, merge)

    def _send_adapters(self, adapters: AdapterBatch) -> AdapterBatch:
        """The segments on the device, copied where they are not those of the step before."""
        if self._adapters is None or self._adapters[0] is not adapters:
            tensors = iter(self._adapter_tables.upload(adapters.tensors()))
            self._adapters = adapters, adapters.with_tensors(tensors)
        return self._adapters[1]

    def _before_layer(self, arrivals: Sequence[Arrival], index: int) -> AbstractContextManager[None]:
        """Lets the stream wait for the layer's adapters; the trace shows how long the host is busy."""
        for arrival in arrivals:
            event = arrival.before_layer(index)
            if event is not None:
                self._streams.wait("compute", event)
        traced = self._clock.around_layer
        return nullcontext() if traced is None else traced(index)

    def _read(
        self, step: SearchedStep, readout: StepReadout, sent: _Sent, hidden_states: Tensor
    ) -> list[StepOutput]:
        """Reads the rows on the device, copies what they gave back by two copies, and waits for them."""
        num_texts, vocabulary = len(readout.texts), self._general.vocab_size
        tenants = [step.tenants[index] for index in readout.heads]
        with self._streams.on("compute"):
            logits = self._model.logits(hidden_states[sent.text_rows])
            likeliest = logits.argmax(-1)
            drawn = logits[sent.drawn].float()
            of_heads = self._of_heads(tenants, hidden_states[sent.head_rows])
            values = [each.values for each in of_heads if isinstance(each, HeadOutput)]
            floats = torch.cat([each.reshape(-1) for each in (drawn, *values)])
            host = self._slot.results(_ID_ELEMENTS * num_texts + floats.numel())
            ids = host[: _ID_ELEMENTS * num_texts].view(torch.int64)
            ids.copy_(likeliest, non_blocking=True)
            host[_ID_ELEMENTS * num_texts :].copy_(floats, non_blocking=True)
        self._streams.record("compute").synchronize()
        hmi_kernels.raise_faults(self._streams.device.index or 0)
        # What is kept outlives the step; the slot's memory is the next one's.
        left = host[_ID_ELEMENTS * num_texts :].clone()
        of_drawn, left = left.tensor_split([vocabulary * len(readout.drawn)])
        rows = dict(zip(readout.drawn, of_drawn.view(-1, vocabulary), strict=True))
        outputs: list[StepOutput] = [None] * len(step.scheduled)
        for place, (index, token) in enumerate(zip(readout.texts, ids.tolist(), strict=True)):
            outputs[index] = NextToken(rows.get(place), token)
        for index, output in zip(readout.heads, of_heads, strict=True):
            if isinstance(output, HmiError):
                outputs[index] = output
                continue
            own, left = left.tensor_split([output.values.numel()])
            outputs[index] = replace(output, values=own.view(output.values.shape))
        return outputs

    def _of_heads(
        self, tenants: Sequence[ResidentTenant], hidden_states: Tensor
    ) -> Sequence[HeadOutput | HmiError]:
        if not tenants:
            return []
        states = self._model.final_norm(hidden_states).float().split(1)
        return read_out(tenants, states, self._model.pooler)
