"""From logits to the next token: penalty, temperature, top-k, top-p, and draws that depend on a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch

from hmi_engine.sampling import Sampling

__all__ = ["ChosenToken", "NextToken", "TokenChooser"]


class NextToken(NamedTuple):
    """What the model says of a text's next token.

    Attributes:
        logits: float32 [V] in host memory; None where the text's chooser does not need them.
        likeliest: the token with the largest.
    """

    logits: torch.Tensor | None
    likeliest: int


class ChosenToken(NamedTuple):
    """A token, and its log-probability by the model's own logits where that was asked for."""

    token_id: int
    logprob: float | None


class TokenChooser:
    """Chooses the tokens of one request, one after another; what it draws depends on nothing else.

    The order of the steps is that of transformers' ``generate``: penalty, temperature, top-k, top-p.
    """

    def __init__(self, sampling: Sampling) -> None:
        """Nothing is drawn yet."""
        self._sampling = sampling
        self._takes_likeliest = sampling.is_greedy and sampling.repetition_penalty == 1.0
        self._random = random.Random(sampling.seed)

    @property
    def needs_logits(self) -> bool:
        """Whether the likeliest token is not all that it asks for."""
        return not self._takes_likeliest or self._sampling.logprobs

    def choose(self, following: NextToken, seen: Sequence[int]) -> ChosenToken:
        """The next token, where the tokens ``seen`` are in prompt and text."""
        if not self.needs_logits:
            return ChosenToken(following.likeliest, None)
        sampling, logits = self._sampling, following.logits
        assert logits is not None  # as they are needed
        if self._takes_likeliest:
            token = following.likeliest
        else:
            scores = _penalized(logits, seen, sampling.repetition_penalty)
            token = int(scores.argmax()) if sampling.is_greedy else self._draw(scores)
        if not sampling.logprobs:
            return ChosenToken(token, None)
        return ChosenToken(token, float(logits[token] - logits.logsumexp(0)))

    def _draw(self, scores: torch.Tensor) -> int:
        """By the inverse of the distribution function, over the tokens from the likeliest down."""
        sampling = self._sampling
        ordered, tokens = scores.sort(descending=True, stable=True)
        if sampling.top_k is not None:
            ordered, tokens = ordered[: sampling.top_k], tokens[: sampling.top_k]
        # The largest is subtracted first: divided by a tiny temperature it would be infinite.
        shares = ((ordered - ordered[0]).double() / float(sampling.temperature)).softmax(0)
        reached = shares.cumsum(0)
        # The token with which top_p is reached is still in.
        kept = int((reached - shares < sampling.top_p).sum()) if sampling.top_p < 1 else len(shares)
        place = int(torch.searchsorted(reached[:kept], self._random.random() * float(reached[kept - 1])))
        return int(tokens[min(place, kept - 1)])


def _penalized(logits: torch.Tensor, seen: Sequence[int], penalty: float) -> torch.Tensor:
    if penalty == 1.0 or not seen:
        return logits
    tokens = torch.tensor(sorted(set(seen)))
    scores = logits.clone()
    of_seen = scores[tokens]
    scores[tokens] = torch.where(of_seen < 0, of_seen * penalty, of_seen / penalty)
    return scores
