"""An adapter and a head on cached hidden states: what an optimizer changes and the engine will serve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hmi_engine.construct.hidden_dropout import HiddenDropout
from hmi_engine.construct.objectives import Objective
from hmi_engine.construct.trainable_adapter import AppliedAdapter, TrainableAdapter
from hmi_engine.construct.trainable_layers import TrainableLayers
from hmi_engine.construct.training_cache import HiddenStateCache
from hmi_engine.construct.training_data import TaskData, WordPlaces
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PackedSequences, Readout

__all__ = ["TrainableTenant"]

TEXTS_PER_PREDICTION = 64


class TrainableTenant(nn.Module):
    """An adapter on a frozen base, and a head on what it reads of the result."""

    def __init__(
        self,
        model: HierarchicalBert,
        adapter: TrainableAdapter,
        objective: Objective,
        generator: torch.Generator,
        dropout: HiddenDropout | None = None,
    ) -> None:
        super().__init__()
        self.model, self.adapter, self.objective = model, adapter, objective
        self.layers = TrainableLayers(model, adapter, dropout)
        self.head = objective.new_head(model.configuration.hidden_size, generator)

    def forward(self, states: HiddenStateCache, data: TaskData, numbers: Sequence[int]) -> Tensor:
        """Outputs for the examples ``numbers``, with gradients.

        Rows are in the order of ``data.batch_texts``: one for each text, or for each of its words.
        """
        texts = data.batch_texts(numbers)
        read = self.layers.read(states.dense(texts), self.objective.reading, data.batch_words(texts))
        outputs: Tensor = self.head(read)
        return outputs

    @torch.no_grad()
    def predict(self, states: HiddenStateCache, data: TaskData, numbers: Sequence[int]) -> Tensor:
        """The same float32 rows through the layers that serve, not those that train."""
        texts = data.batch_texts(numbers)
        runs = [
            texts[start : start + TEXTS_PER_PREDICTION]
            for start in range(0, len(texts), TEXTS_PER_PREDICTION)
        ]
        outputs: Tensor = self.head(torch.cat([self._served(states, data, run) for run in runs]))
        return outputs

    def _served(self, states: HiddenStateCache, data: TaskData, texts: Sequence[int]) -> Tensor:
        hidden_states, sequences = states.packed(texts)
        first, first_only = self.adapter.first_layer, self.objective.reading == "cls"
        if states.halfway:
            hidden_states, first = self.layers.finish(hidden_states), first + 1
        output = self.model.run_layers(
            hidden_states,
            sequences,
            first=first,
            adapters=AppliedAdapter(self.adapter),
            readout=Readout.select(sequences, [first_only] * sequences.num_sequences),
        )
        if first_only:
            return output  # the readout is the first tokens
        return _read_packed(output, sequences, data.batch_words(texts))


def _read_packed(output: Tensor, sequences: PackedSequences, words: WordPlaces | None) -> Tensor:
    """Rows of a head that reads words, or the mean over tokens."""
    if words is not None:
        return output[sequences.offsets[words.sequences] + words.places]
    return torch.stack([part.mean(dim=0) for part in output.split(sequences.lengths)])
