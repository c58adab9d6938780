"""What computes a searched batch: the CPU, which has its results at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

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


class HostCompute:
    """Computes on the CPU, all of it in ``launch``."""

    is_asynchronous = False

    def __init__(self, general: GeneralInfo, model: HierarchicalBert, clock: StageClock) -> None:
        self._general = general
        self._model = model
        self._clock = clock

    def send(self, searched: SearchedBatch) -> None:
        """All is there."""

    # Under no_grad alone each op of ours would go through autograd's wrapper in Python.
    @torch.inference_mode()
    def launch(self, searched: SearchedBatch) -> Callable[[], Outputs]:
        """Computes; the result is there."""
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
        own = [
            output if isinstance(output, HmiError) else replace(output, values=output.values.clone())
            for output in outputs
        ]
        return lambda: own

    def release(self, searched: SearchedBatch) -> None:
        """There is nothing to let go of."""

    def _enter(self, searched: SearchedBatch) -> torch.Tensor:
        """The input of the first upper layer: looked up, or, with K = 0, the embeddings."""
        sequences, view, references = searched.sequences, searched.view, searched.references
        if view is None or references is None:
            return self._model.embed(sequences.input_ids, sequences.positions())
        return view.merge(self._model, sequences, searched.domains, references)
