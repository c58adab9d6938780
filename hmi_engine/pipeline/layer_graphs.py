"""The upper layers of batches as graphs: the device is told of a layer by one call.

A small model's batch is a hundred launches and more, which take the host longer than the device needs to
run them. What was captured has the same sizes each time and reads the same memory: so batches are padded to a
few shapes, and what tells them apart is copied to where their shape's graphs read it. Each layer is a graph
of its own, so that it waits for its own adapters alone, as without graphs.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.memory.adapter_batch import AdapterBatch
from hmi_engine.memory.streams import DeviceGraph, DeviceStreams
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PaddedBounds, PaddedSelection
from hmi_engine.pipeline.arriving_adapters import ArrivingAdapters
from hmi_engine.pipeline.batch_compute import SearchedBatch
from hmi_engine.pipeline.device_buffers import BatchSlot, Shape, views_of
from hmi_engine.pipeline.graph_shape import GraphShape

__all__ = ["LayerGraphs", "SentTables"]

_logger = logging.getLogger("hmi_engine")

MOST_SHAPES = 64
"""Graphs are kept for so many shapes, those that came last."""


class SentTables(NamedTuple):
    """What graphs read of a batch beside its hidden states.

    Attributes:
        shape: that the batch is padded to.
        adapters: of the padded batch, in host memory.
        layout: shapes and dtypes of what lies in ``tables``.
        tables: uint8 [bytes] in the batch's slot on the device, when the stream ``gather`` has run.
    """

    shape: GraphShape
    adapters: AdapterBatch
    layout: Sequence[Shape]
    tables: Tensor


class _Captured:
    """The layers of one shape, and the memory that they read."""

    def __init__(self, sent: SentTables) -> None:
        """Copies nothing yet; called on the stream that will run the layers."""
        self.form = sent.adapters.form
        self.tables = torch.empty_like(sent.tables)
        tensors = iter(views_of(self.tables, sent.layout))
        self.bounds = PaddedBounds(next(tensors), sent.shape.max_length)
        self.first_rows = PaddedSelection(next(tensors), next(tensors))
        self.adapters = sent.adapters.with_tensors(tensors)
        self.has_run = False
        self.graphs: Sequence[DeviceGraph] = ()


class LayerGraphs:
    """Runs the layers of batches that were sent. ``send`` is for one thread, ``run`` for one.

    A shape that comes for the first time is launched kernel by kernel; from the second time on its graphs
    run. They are captured anew when a tenant brings a place or a rank that nobody had.
    """

    def __init__(
        self, general: GeneralInfo, model: HierarchicalBert, streams: DeviceStreams, max_batch_tokens: int
    ) -> None:
        """Captures nothing yet; larger batches than ``max_batch_tokens`` have no graphs."""
        self._general, self._model, self._streams = general, model, streams
        self._max_batch_tokens = max_batch_tokens
        self._is_usable = streams.has_graphs and general.num_upper_layers > 0
        self._captured: OrderedDict[GraphShape, _Captured] = OrderedDict()
        self._memory: tuple[Tensor, Tensor] | None = None

    def send(self, searched: SearchedBatch, slot: BatchSlot) -> SentTables | None:
        """Puts on the stream ``gather`` what graphs read beside hidden states; None if there will be none."""
        if not self._is_usable or searched.sequences.num_tokens > self._max_batch_tokens:
            return None
        shape = GraphShape.of(searched.sequences, searched.rows_read, self._general.max_positions)
        if not shape.is_usable:
            return None
        adapters = searched.adapters.padded(shape.num_sequences)
        tensors = [*shape.bounds(searched.sequences.offsets), *adapters.tensors()]
        slot.graph_tables.upload(tensors)
        layout = [(tensor.shape, tensor.dtype) for tensor in tensors]
        return SentTables(shape, adapters, layout, slot.graph_tables.laid_out)

    def run(self, sent: SentTables, hidden_states: Tensor, arriving: ArrivingAdapters) -> Tensor:
        """Puts the upper layers on the stream ``compute``: hidden states [T, H] -> [rows, H].

        The rows are the first one of each sequence where the shape reads no others, and then padding; else
        all tokens and padding. The next run overwrites them.
        """
        with self._streams.on("compute"):
            captured = self._shape(sent)
            captured.tables.copy_(sent.tables)
            all_rows, first_rows = self._rows(sent.shape)
            all_rows[: len(hidden_states)].copy_(hidden_states)
        if captured.has_run and not captured.graphs and self._is_usable:
            self._capture(sent.shape, captured)
        for place, layer in enumerate(self._general.upper_layers):
            with arriving.before_layer(layer):
                if captured.graphs:
                    captured.graphs[place].replay()
                    continue
                with self._streams.on("compute"):
                    self._run_layer(sent.shape, captured, layer)
        captured.has_run = True
        return first_rows if sent.shape.reads_first else all_rows

    def _run_layer(self, shape: GraphShape, captured: _Captured, layer: int) -> None:
        """Computes a layer, in place but for the last one where it gives first rows."""
        all_rows, first_rows = self._rows(shape)
        is_read = shape.reads_first and layer == self._general.upper_layers[-1]
        result = self._model.run_layers(
            all_rows,
            captured.bounds,
            first=layer,
            last=layer + 1,
            adapters=captured.adapters,
            readout=captured.first_rows if is_read else None,
        )
        (first_rows if is_read else all_rows).copy_(result)

    def _capture(self, shape: GraphShape, captured: _Captured) -> None:
        """Makes the graphs of a shape that has run; if that fails, there are none from now on."""
        try:
            captured.graphs = [
                self._streams.capture("compute", partial(self._run_layer, shape, captured, layer))[0]
                for layer in self._general.upper_layers
            ]
        except (RuntimeError, ValueError) as reason:
            self._is_usable = False
            self._streams.synchronize()
            for each in self._captured.values():
                each.graphs = ()
            _logger.warning("layers cannot be captured as graphs and will take longer: %s", reason)

    def _shape(self, sent: SentTables) -> _Captured:
        """What there is of a shape, or its beginning."""
        captured = self._captured.pop(sent.shape, None)
        if captured is None or captured.form != sent.adapters.form:
            if captured is not None or len(self._captured) >= MOST_SHAPES:
                self._streams.synchronize()  # what goes may still run
            while len(self._captured) >= MOST_SHAPES:
                self._captured.popitem(last=False)
            captured = _Captured(sent)
        self._captured[sent.shape] = captured  # behind those that came before
        return captured

    def _rows(self, shape: GraphShape) -> tuple[Tensor, Tensor]:
        """Memory for all tokens and for first rows, the same for all shapes, as one batch runs at a time."""
        if self._memory is None:
            weight = self._model.merge_norm.weight
            sizes = GraphShape.most_rows(self._max_batch_tokens)
            first, second = (
                torch.zeros(size, len(weight), dtype=weight.dtype, device=weight.device) for size in sizes
            )
            self._memory = first, second
        all_rows, first_rows = self._memory
        return all_rows[: shape.num_tokens], first_rows[: shape.num_sequences]
