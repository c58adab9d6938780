"""Computes batches on a device beside the host: what a batch needs is sent ahead, its results come later."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.memory.adapter_batch import AdapterBatch
from hmi_engine.memory.device_rows import DeviceRows
from hmi_engine.memory.plot_view import MergeInputs, merge_rows
from hmi_engine.memory.streams import DeviceStreams, StreamEvent
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PackedSequences, Readout
from hmi_engine.pipeline.arriving_adapters import ArrivingAdapters
from hmi_engine.pipeline.batch_compute import Outputs, SearchedBatch
from hmi_engine.pipeline.device_buffers import BatchSlot, SlotRing
from hmi_engine.pipeline.layer_graphs import LayerGraphs, SentTables
from hmi_engine.pipeline.read_out import HeadOutput, read_out, with_own_values
from hmi_engine.pipeline.stage_clock import StageClock

__all__ = ["DeviceCompute"]


@dataclass
class _Sent:
    """A batch in flight: its slot, and what of it is on the device or on its way there.

    ``adapters`` are None where ``tables`` have them, for graphs of the layers. ``merge`` and
    ``hidden_states`` (the input of the first upper layer) are None where nothing is looked up. After
    ``ready`` a layer can run, but for its adapters.
    """

    slot: BatchSlot
    sequences: PackedSequences
    positions: Tensor
    readout: Readout | None
    adapters: AdapterBatch | None
    tables: SentTables | None
    merge: MergeInputs | None
    hidden_states: Tensor | None = None
    ready: StreamEvent | None = None
    is_finished: bool = False


class DeviceCompute:
    """Runs batches on the three streams of a device; as many may be in flight as there are slots.

    ``copy`` brings adapters; ``gather`` brings inputs and PLOT rows, and merges the rows; ``compute`` runs
    each layer when its input and its own adapters are there, then the heads, and copies what they gave back.
    Layers are graphs, where there are such. A batch's slot, tables and tenants are given to nobody else
    before its results are on the host.
    """

    is_asynchronous = True

    def __init__(
        self,
        general: GeneralInfo,
        model: HierarchicalBert,
        streams: DeviceStreams,
        rows: DeviceRows,
        *,
        batches_in_flight: int,
        clock: StageClock,
        graphs: LayerGraphs | None,
    ) -> None:
        """Takes no memory yet; ``model``, and that of ``graphs``, lies on the device of ``streams``."""
        streams.synchronize()  # some of the model's weights were put together on another stream
        self._general = general
        self._model = model
        self._streams = streams
        self._rows = rows
        self._ring = SlotRing(streams, batches_in_flight)
        self._clock = clock
        self._graphs = graphs

    def send(self, searched: SearchedBatch) -> None:
        """Copies inputs and rows, and merges the rows, as soon as the streams come to it."""
        slot = self._ring.take()
        try:
            searched.sent = sent = self._send_inputs(searched, slot)
        except BaseException:
            self._streams.synchronize()
            self._ring.give_back(slot)
            raise
        if sent.merge is not None:
            slot.rows.send()
            with self._streams.on("gather"):
                sent.hidden_states = merge_rows(self._model, sent.merge, window=self._general.window)
        sent.ready = self._streams.record("gather")

    # Under no_grad alone each op of ours would go through autograd's wrapper in Python.
    @torch.inference_mode()
    def launch(self, searched: SearchedBatch) -> Callable[[], Outputs]:
        """Puts layers and heads on the stream; the result waits until the device has run them."""
        sent: _Sent = searched.sent
        assert sent.ready is not None  # it was sent
        self._streams.wait("compute", sent.ready)
        arriving = ArrivingAdapters(self._streams, searched.arrivals, self._clock)
        hidden_states = self._run_layers(sent, arriving)
        arriving.before_heads()
        with self._streams.on("compute"):
            rows_read = searched.rows_read
            parts = hidden_states[: sum(rows_read)].float().split(rows_read)
            outputs = read_out(searched.tenants, parts, self._model.pooler)
            values = _copy_back([each for each in outputs if isinstance(each, HeadOutput)], sent.slot)
        return partial(self._finish, sent, outputs, values, self._streams.record("compute"))

    def release(self, searched: SearchedBatch) -> None:
        """Frees the slot; a batch whose results nobody waited for is waited for now."""
        sent, searched.sent = searched.sent, None
        if sent is not None:
            if not sent.is_finished:
                self._streams.synchronize()
            self._ring.give_back(sent.slot)

    def _run_layers(self, sent: _Sent, arriving: ArrivingAdapters) -> Tensor:
        """The upper layers, each when its adapters are there; the rows that are read, and maybe more."""
        with self._streams.on("compute"):
            hidden_states = sent.hidden_states
            if hidden_states is None:
                hidden_states = self._model.embed(sent.sequences.input_ids, sent.positions)
            if sent.tables is None:
                return self._model.run_layers(
                    hidden_states,
                    sent.sequences,
                    first=self._general.plot_layers,
                    adapters=sent.adapters,
                    readout=sent.readout,
                    around_layer=arriving.before_layer,
                )
        assert self._graphs is not None  # they took the batch
        hidden_states = self._graphs.run(sent.tables, hidden_states, arriving)
        if sent.readout is None or sent.tables.shape.reads_first:
            return hidden_states
        with self._streams.on("compute"):
            return hidden_states[sent.readout.rows]

    def _send_inputs(self, searched: SearchedBatch, slot: BatchSlot) -> _Sent:
        """Copies all small inputs at once; lays out, but does not send, the rows."""
        sequences, readout, view = searched.sequences, searched.readout, searched.view
        merge = None
        if view is not None and searched.references is not None:
            merge = view.merge_inputs(sequences, searched.domains, searched.references)
            merge = self._rows.bring(merge, slot.rows.lay_out)
        tables = None if self._graphs is None else self._graphs.send(searched, slot)
        tensors = iter(
            slot.inputs.upload(
                [
                    sequences.input_ids,
                    sequences.offsets,
                    sequences.positions(),
                    *([] if readout is None else [readout.rows, readout.offsets]),
                    *([] if tables is not None else searched.adapters.tensors()),
                    *([] if merge is None else [merge.references, merge.unigrams_of_sequences]),
                ]
            )
        )
        sequences = PackedSequences(next(tensors), next(tensors), sequences.lengths)
        positions = next(tensors)
        if readout is not None:
            readout = Readout(next(tensors), next(tensors), readout.counts)
        adapters = None if tables is not None else searched.adapters.with_tensors(tensors)
        if merge is not None:
            merge = merge._replace(
                input_ids=sequences.input_ids,
                offsets=sequences.offsets,
                references=next(tensors),
                unigrams_of_sequences=next(tensors),
            )
        return _Sent(slot, sequences, positions, readout, adapters, tables, merge)

    def _finish(self, sent: _Sent, outputs: Outputs, values: Tensor, computed: StreamEvent) -> Outputs:
        """The outputs, on tensors of the host of their own."""
        computed.synchronize()
        sent.is_finished = True
        hmi_kernels.raise_faults(self._streams.device.index or 0)
        return with_own_values(outputs, values)


def _copy_back(outputs: Sequence[HeadOutput], slot: BatchSlot) -> Tensor:
    """Copies the values of all outputs to the host, at once: float32, one behind the other."""
    host = slot.results(sum(output.values.numel() for output in outputs))
    if outputs:
        host.copy_(torch.cat([output.values.reshape(-1) for output in outputs]), non_blocking=True)
    return host
