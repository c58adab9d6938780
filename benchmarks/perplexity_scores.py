"""What a language model makes of documents, token by token, and what may be said of many documents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.result import Interval
from hmi_engine.demo.timing import CONFIDENCE, RESAMPLES

__all__ = ["Scores", "batches_of", "document_losses", "perplexity", "perplexity_ratio"]


@dataclass(frozen=True)
class Scores:
    """Of each document the sum of its tokens' negative log-likelihoods, and how many those are.

    ``found`` are the shares of tokens whose row was a trigram's, a bigram's and a unigram's; empty where
    nothing was looked up.
    """

    losses: tuple[float, ...]
    tokens: tuple[int, ...]
    found: tuple[float, ...] = ()

    @property
    def perplexity(self) -> float:
        """Over all tokens."""
        return math.exp(sum(self.losses) / sum(self.tokens))


def batches_of(documents: Sequence[list[int]], size: int) -> Iterator[list[int]]:
    """Places of documents in batches of similar length."""
    order = sorted(range(len(documents)), key=lambda place: len(documents[place]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def document_losses(logits: Tensor, documents: Sequence[list[int]]) -> list[float]:
    """Logits [T, V] after each token of packed documents -> of each the loss of all tokens but its first."""
    ids = torch.tensor([token for document in documents for token in document])
    losses = functional.cross_entropy(logits[:-1], ids[1:], reduction="none").double()
    results, start = [], 0
    for document in documents:
        results.append(float(losses[start : start + len(document) - 1].sum()))
        start += len(document)
    return results


def perplexity(scores: Scores) -> Interval:
    """Perplexity over all tokens, and its percentile-bootstrap interval over documents (Efron 1979)."""
    return _interval(_means(scores)[1:], _means(scores)[0])


def perplexity_ratio(scores: Scores, base: Scores) -> Interval:
    """Perplexity over that of ``base`` on the same documents, which are drawn together."""
    differences = _means(scores) - _means(base)
    return _interval(differences[1:], differences[0])


def _interval(samples: np.ndarray, value: float) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.exp(np.quantile(samples, [tail, 1 - tail]))
    return Interval(value=math.exp(value), low=float(low), high=float(high))


def _means(scores: Scores) -> np.ndarray:
    """Mean losses of a token: of all documents, then of the documents that each bootstrap sample draws."""
    losses, tokens = np.array(scores.losses), np.array(scores.tokens, dtype=np.float64)
    generator = np.random.default_rng(0)
    means = [losses.sum() / tokens.sum()]
    for _ in range(RESAMPLES):  # one by one: all draws of thousands of documents at once fill the memory
        drawn = generator.integers(len(losses), size=len(losses))
        means.append(losses[drawn].sum() / tokens[drawn].sum())
    return np.array(means)
