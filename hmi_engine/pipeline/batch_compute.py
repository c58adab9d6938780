"""What computes a searched batch: the CPU, which has its results at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

import hmi_kernels
from hmi_engine.errors import HmiError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.memory.adapter_batch import AdapterBatch
from hmi_engine.memory.plot_view import PlotView
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.streams import Arrival
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PackedSequences, Readout
from hmi_engine.pipeline.read_out import HeadOutput, read_out
from hmi_engine.pipeline.row_padding import pad_batch
from hmi_engine.pipeline.stage_clock import StageClock

__all__ = ["BatchCompute", "HostCompute", "Outputs", "SearchedBatch"]

Outputs = list[HeadOutput | HmiError]


@dataclass
class SearchedBatch:
    """What the model needs for the items that can be served, which are ``items[i] for i in served``.

    Attributes:
        number: of the batch.
        served: which items of the batch are computed.
        tenants: of each, its tenant.
        view: the lease on their domains' tables; None where no layers are looked up.
        sequences: their tokens, in host memory like all that follows.
        readout: the rows that heads read; None for all.
        adapters: what the layers apply.
        references: rows of the windows, None without a view.
        arrivals: what brings tenants that are still on their way to the device.
        sent: what a device keeps of the batch while it is in flight.
    """

    number: int
    served: list[int]
    tenants: list[ResidentTenant]
    view: PlotView | None
    sequences: PackedSequences
    readout: Readout | None
    adapters: AdapterBatch
    references: torch.Tensor | None
    arrivals: list[Arrival]
    sent: Any = None

    @property
    def domains(self) -> list[str]:
        """Of each tenant its domain."""
        return [tenant.info.domain for tenant in self.tenants]

    @property
    def rows_read(self) -> tuple[int, ...]:
        """Of each sequence how many of its last hidden states are there in the end."""
        return self.sequences.lengths if self.readout is None else self.readout.counts

    def pieces(self, most_tokens: int) -> Iterator[SearchedBatch]:
        """The batch in parts of about equal size, each of at most ``most_tokens`` or one longer sequence."""
        offsets = self.sequences.offsets.tolist()
        num_pieces = -(-offsets[-1] // most_tokens)
        size = -(-offsets[-1] // num_pieces)
        first = 0
        while first < len(self.served):
            # A sequence that crosses the even share is taken along where it still fits.
            last = bisect_right(offsets, offsets[first] + size)
            if last < len(offsets) and offsets[last] - offsets[first] > most_tokens:
                last -= 1
            last = min(max(last, first + 1), len(self.served))
            yield self if last - first == len(self.served) else self._between(first, last)
            first = last

    def _between(self, first: int, last: int) -> SearchedBatch:
        sequences, readout, references = self.sequences, self.readout, self.references
        start, end = int(sequences.offsets[first]), int(sequences.offsets[last])
        return replace(
            self,
            served=self.served[first:last],
            tenants=self.tenants[first:last],
            sequences=sequences.between(first, last),
            readout=None if readout is None else readout.between(sequences, first, last),
            adapters=self.adapters.between(first, last),
            references=None if references is None else references[start:end],
        )


class BatchCompute(Protocol):
    """Computes batches, on the device that it was made for."""

    is_asynchronous: bool
    """Whether ``launch`` returns before the results are there."""

    def send(self, searched: SearchedBatch) -> None:
        """Puts on its way to the device what the batch needs; nothing of ``searched`` changes from now on."""

    def launch(self, searched: SearchedBatch) -> Callable[[], Outputs]:
        """Starts to compute a batch that was sent; the result waits for what heads give, in host memory."""

    def release(self, searched: SearchedBatch) -> None:
        """Lets go of a batch's memory, after its results or without; waits if the device still uses it."""


_PIECE_BYTES = 12 << 20
"""Of float32, that the widest hidden states of a piece of a batch take: 2,048 tokens for a width of 384.

With the others they stay within what malloc gives a thread from one heap (64 MiB in glibc). Of more it
returns a part to the system after each batch, which has to fill it with zeros again for the next: a third of
the time of batches of 3,000 tokens. Products are as fast with 2,048 tokens as with more.
"""


class HostCompute:
    """Computes on the CPU, all of it in ``launch``."""

    is_asynchronous = False

    def __init__(self, general: GeneralInfo, model: HierarchicalBert, clock: StageClock) -> None:
        self._general = general
        self._model = model
        self._clock = clock
        self._piece_tokens = max(1, _PIECE_BYTES // (4 * model.configuration.intermediate_size))
        hmi_kernels.keep_freed_memory()

    def send(self, searched: SearchedBatch) -> None:
        """All is there."""

    # Under no_grad alone each op of ours would go through autograd's wrapper in Python.
    @torch.inference_mode()
    def launch(self, searched: SearchedBatch) -> Callable[[], Outputs]:
        """Computes; the result is there."""
        outputs = [output for piece in searched.pieces(self._piece_tokens) for output in self._outputs(piece)]
        return lambda: outputs

    def _outputs(self, searched: SearchedBatch) -> Outputs:
        padded = pad_batch(searched.sequences, searched.readout)
        hidden_states = self._model.run_layers(
            padded.pad(self._enter(searched)),
            padded.sequences,
            first=self._general.plot_layers,
            adapters=searched.adapters,
            readout=padded.readout,
            around_layer=self._clock.around_layer,
        )
        rows_read = searched.rows_read
        parts = hidden_states[: sum(rows_read)].split(rows_read)
        outputs = read_out(searched.tenants, parts, self._model.pooler)
        # Whoever keeps one embedding should not keep those of the whole batch.
        return [
            output if isinstance(output, HmiError) else replace(output, values=output.values.clone())
            for output in outputs
        ]

    def release(self, searched: SearchedBatch) -> None:
        """There is nothing to let go of."""

    def _enter(self, searched: SearchedBatch) -> torch.Tensor:
        """The input of the first upper layer: looked up, or, with K = 0, the embeddings."""
        sequences, view, references = searched.sequences, searched.view, searched.references
        if view is None or references is None:
            return self._model.embed(sequences.input_ids, sequences.positions())
        return view.merge(self._model, sequences, searched.domains, references)
