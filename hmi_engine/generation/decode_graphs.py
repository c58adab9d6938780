"""Steps that give each text under way one token, as graphs: the device is told of a step by one call.

A small model's step is a hundred launches, which take the host longer than the device needs to run them. What
was captured reads from the same memory each time, and has the same sizes: so there is a graph for each of a
few numbers of texts, and what is missing to that number are texts of one token that nobody reads.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hmi_engine.generation.cache import BlockTables, KeyValueCache, PagedAttention
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.memory.adapter_batch import AdapterBatch
from hmi_engine.memory.streams import DeviceGraph, DeviceStreams
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.pipeline.device_buffers import StagedBuffer

__all__ = ["DecodeGraphs"]

_logger = logging.getLogger("hmi_engine")

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of texts; of more, a step is launched kernel by kernel."""


class _Captured(NamedTuple):
    """A graph, where it reads and where it writes."""

    graph: DeviceGraph
    hidden_states: Tensor
    logits: Tensor
    likeliest: Tensor


class _Size:
    """The graph for one number of texts, and the memory that it reads."""

    def __init__(self, streams: DeviceStreams) -> None:
        self.tables = StagedBuffer(streams)
        self.adapter_tables = StagedBuffer(streams)
        self.adapters: AdapterBatch | None = None
        self.form: object = None
        self.captured: _Captured | None = None


class DecodeGraphs:
    """The upper layers, language head and choice of the likeliest token, of steps of one token for each text.

    Not what comes before: which rows a merge reads, and where, differs from step to step. For one thread, one
    step at a time.
    """

    def __init__(
        self,
        general: GeneralInfo,
        model: HierarchicalGpt2,
        streams: DeviceStreams,
        cache: KeyValueCache,
    ) -> None:
        """Captures nothing yet."""
        self._general, self._model, self._streams, self._cache = general, model, streams, cache
        self._width = -(-general.max_positions // cache.block_size)
        self._sizes: dict[int, _Size] = {}
        self._is_usable = streams.has_graphs

    def takes(self, num_texts: int) -> bool:
        """Whether there is, or will be, a graph for so many texts."""
        return self._is_usable and num_texts <= SIZES[-1]

    def send(self, tables: BlockTables, adapters: AdapterBatch) -> bool:
        """Puts on the stream ``gather`` what a step reads beside its hidden states, where its graph reads it.

        Each sequence of ``tables`` has one new token. False if it turns out that steps cannot be captured.
        """
        count = len(tables.lengths)
        size = self._size(count)
        number = _bucket(count)
        missing = number - count
        # What is missing are sequences of one token, all of them in the block that nobody has.
        blocks = functional.pad(
            tables.blocks,
            (0, self._width - tables.blocks.shape[1], 0, missing),
            value=self._cache.spare_block,
        )
        lengths = functional.pad(tables.lengths, (0, missing), value=1)
        sent = BlockTables(*size.tables.upload([blocks, torch.arange(number + 1), lengths]))
        if size.adapters is not adapters:
            padded = adapters.padded(number)
            form = padded.form
            tensors = iter(size.adapter_tables.upload(padded.tensors()))
            if size.captured is None or size.form != form:
                try:
                    size.captured = self._capture(number, sent, padded.with_tensors(tensors))
                except (RuntimeError, ValueError) as reason:
                    self._give_up(reason)
                    return False
                size.form = form
            size.adapters = adapters
        return True

    def run(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Runs what was sent, on the stream ``compute``: [n, H] -> logits [n, V], likeliest tokens int64 [n].

        Both are overwritten by the next run of the size.
        """
        count = len(hidden_states)
        captured = self._size(count).captured
        assert captured is not None  # it was sent
        with self._streams.on("compute"):
            captured.hidden_states[:count].copy_(hidden_states)
        captured.graph.replay()
        return captured.logits[:count], captured.likeliest[:count]

    def forget(self) -> None:
        """After a failure nothing that was sent is taken for what is there."""
        for size in self._sizes.values():
            size.adapters = None

    def _give_up(self, reason: Exception) -> None:
        """From now on steps are launched kernel by kernel."""
        self._is_usable = False
        self._streams.synchronize()
        self._sizes.clear()
        _logger.warning("steps cannot be captured as graphs and will take longer: %s", reason)

    def _size(self, count: int) -> _Size:
        number = _bucket(count)
        if number not in self._sizes:
            self._sizes[number] = _Size(self._streams)
        return self._sizes[number]

    def _capture(self, number: int, tables: BlockTables, adapters: AdapterBatch) -> _Captured:
        """A graph for a form of adapters, whose work is run once before."""
        weight = self._model.merge_norm.weight
        with self._streams.on("compute"):
            hidden_states = torch.zeros(number, len(weight), dtype=weight.dtype, device=weight.device)
        first = self._general.plot_layers
        attend = PagedAttention(self._cache, tables, first)

        def work() -> tuple[Tensor, Tensor]:
            states = self._model.run_layers(hidden_states, attend, first=first, adapters=adapters)
            logits = self._model.logits(states)
            return logits, logits.argmax(-1)

        self._streams.wait("compute", self._streams.record("gather"))
        with self._streams.on("compute"):
            work()
        # What it wrote to the cache, of zeros, is written once more when the step itself runs.
        self._streams.record("compute").synchronize()
        graph, (logits, likeliest) = self._streams.capture("compute", work)
        return _Captured(graph, hidden_states, logits, likeliest)


def _bucket(count: int) -> int:
    return next(size for size in SIZES if count <= size)
