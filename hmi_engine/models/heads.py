"""What the heads read of the last hidden states."""

from __future__ import annotations

import torch

from hmi_engine.errors import InvalidHeadError
from hmi_engine.models.linear import SharedLinear

__all__ = ["pool"]


def pool(hidden_states: torch.Tensor, pooling: str, pooler: SharedLinear | None) -> torch.Tensor:
    """Makes one vector of a sequence's hidden states.

    Args:
        hidden_states: [n, H]; of a sequence that is read at its first token only, [1, H].
        pooling: ``"cls"`` (the first token), ``"pooler"`` (the base's tanh layer on it, as transformers'
            ``BertPooler``), ``"mean"`` (the average over all tokens, special tokens included, as
            sentence-transformers' mean pooling).
        pooler: the base model's pooler layer, if it has one.

    Returns:
        [H].

    Raises:
        InvalidHeadError: the base model has no pooler.
    """
    if pooling == "mean":
        return hidden_states.mean(dim=0)
    if pooling == "cls":
        return hidden_states[0]
    if pooler is None:
        raise InvalidHeadError("the base model has no pooler; use a head with pooling 'cls' or 'mean'")
    return torch.tanh(pooler(hidden_states[:1]))[0]
