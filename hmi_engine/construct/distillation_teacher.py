"""The teacher: the base model as it was, and its hidden states for each batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hmi_engine.construct.distillation_cache import StateCache
from hmi_engine.construct.distillation_corpus import DistillationBatch
from hmi_engine.construct.distillation_student import (
    DenseShape,
    embed_tokens,
    encoder_layers,
    run_layers,
    value_relations,
)

if TYPE_CHECKING:
    from transformers import BertModel

__all__ = ["Teacher"]


class Teacher:
    """A frozen base model whose hidden states above layer K - 1 are computed once and cached."""

    def __init__(self, bert: BertModel, plot_layers: int, device: torch.device) -> None:
        """Takes the model over: its weights no longer follow gradients."""
        self._bert = bert.requires_grad_(False)
        nn.Module.to(bert, device)
        self._layers = encoder_layers(bert)
        self._plot_layers, self._device = plot_layers, device
        self.hidden_size = int(bert.config.hidden_size)
        self.num_upper_layers = len(self._layers) - plot_layers
        self._merged: StateCache | None = None
        self._upper: StateCache | None = None

    def keep_states(self, folder: Path, label: str, batches: list[DistillationBatch], max_bytes: int) -> None:
        """Keeps what is computed from now on in files of ``folder``; ``label`` names text and model.

        Raises:
            StoreFullError: no room.
        """
        tokens = [batch.sequences.num_tokens for batch in batches]
        merged_bytes = min(max_bytes, 2 * sum(tokens) * self.hidden_size)
        width = self.num_upper_layers * self.hidden_size
        merged, upper = (folder / f"teacher-{label}.{name}.states" for name in ("merged", "upper"))
        self._merged = StateCache(merged, tokens, self.hidden_size, merged_bytes)
        self._upper = StateCache(upper, tokens, width, max_bytes - merged_bytes)

    def sync(self) -> None:
        """Makes what was computed survive a crash."""
        for cache in (self._merged, self._upper):
            if cache is not None:
                cache.sync()

    def merged(self, batch: DistillationBatch) -> Tensor:
        """What a perfect merge gives: the output of layer K - 1, float16 [T, H] on the CPU."""
        if self._merged is None:
            return self._run_lower(batch).to(torch.float16).cpu()
        return self._merged.get(batch.number, lambda: self._run_lower(batch))

    def upper(self, batch: DistillationBatch) -> list[Tensor]:
        """The outputs of layers K to N - 1, float16 [T, H] each, on the CPU.

        They follow from :meth:`merged` as it was rounded, so they do not depend on what is cached.
        """
        if self._upper is None:
            states = self._run_upper(batch).to(torch.float16).cpu()
        else:
            states = self._upper.get(batch.number, lambda: self._run_upper(batch))
        return list(states.split(self.hidden_size, dim=1))

    @torch.no_grad()
    def relations(self, last_input: Tensor, dense: DenseShape) -> Tensor:
        """Value-value relations of the last layer, from its input [T, H]."""
        return value_relations(self._layers[-1], last_input, dense)

    @torch.no_grad()
    def _run_lower(self, batch: DistillationBatch) -> Tensor:
        dense = DenseShape(batch.sequences, self._device)
        ids = batch.sequences.input_ids.long().to(self._device)
        embedded = embed_tokens(self._bert, ids, dense.positions())
        return run_layers(self._layers[: self._plot_layers], embedded, dense)[-1]

    @torch.no_grad()
    def _run_upper(self, batch: DistillationBatch) -> Tensor:
        dense = DenseShape(batch.sequences, self._device)
        merged = self.merged(batch).to(self._device, torch.float32)
        return torch.cat(run_layers(self._layers[self._plot_layers :], merged, dense), dim=1)
