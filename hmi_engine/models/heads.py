"""What the heads read of the last hidden states."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hmi_engine.errors import InvalidHeadError
from hmi_engine.models.linear import SharedLinear

__all__ = ["pool"]


def pool(
    hidden_states: Sequence[torch.Tensor], poolings: Sequence[str], pooler: SharedLinear | None
) -> list[torch.Tensor | InvalidHeadError]:
    """Makes one vector of each sequence's hidden states.

    Args:
        hidden_states: per sequence [n, H]; of one that is read at its first token only, [1, H].
        poolings: per sequence ``"cls"`` (the first token), ``"pooler"`` (the base's tanh layer on it, as
            transformers' ``BertPooler``) or ``"mean"`` (the average over all tokens, special tokens included,
            as sentence-transformers' mean pooling); ``"last"`` (the last token).
        pooler: the base model's pooler layer, if it has one.

    Returns:
        Per sequence [H], or the error that the base model has no pooler.
    """
    results: list[torch.Tensor | InvalidHeadError] = [
        states.mean(dim=0) if pooling == "mean" else states[-1 if pooling == "last" else 0]
        for states, pooling in zip(hidden_states, poolings, strict=True)
    ]
    pooled = [index for index, pooling in enumerate(poolings) if pooling == "pooler"]
    if not pooled:
        return results
    if pooler is None:
        error = InvalidHeadError("the base model has no pooler; use a head with pooling 'cls' or 'mean'")
        return [error if index in pooled else result for index, result in enumerate(results)]
    vectors = torch.tanh(pooler(torch.stack([hidden_states[index][0] for index in pooled])))
    for index, vector in zip(pooled, vectors, strict=True):
        results[index] = vector
    return results
