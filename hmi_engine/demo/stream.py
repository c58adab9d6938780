"""Mixed streams: batches in which every tenant asks once, each text new to every system."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

from hmi_engine.models.tokenization import TextEncoder
from hmi_engine.request import Request

__all__ = ["MixedStream", "StreamSource", "cut_to_tokens"]


@dataclass(frozen=True)
class StreamSource:
    """Who asks, and what about.

    Attributes:
        tenants: domain of each tenant, by name.
        texts: held-out texts of each domain.
    """

    tenants: Mapping[str, str]
    texts: Mapping[str, Sequence[str]]


class MixedStream:
    """Batches of one request from each tenant in random order, with texts of the tenant's domain.

    No text comes twice before its domain's texts are used up; ``num_repeated`` counts those that did, because
    a repeated text flatters whatever remembers windows.
    """

    def __init__(self, source: StreamSource, *, seed: int = 0) -> None:
        """Shuffles each domain's distinct texts by ``seed``."""
        self._draw = random.Random(seed)
        self._tenants = dict(source.tenants)
        self._texts: dict[str, Iterator[str]] = {}
        self._num_unused: dict[str, int] = {}
        for domain, texts in source.texts.items():
            distinct = list(dict.fromkeys(texts))
            self._draw.shuffle(distinct)
            self._texts[domain] = cycle(distinct)
            self._num_unused[domain] = len(distinct)
        self.num_repeated = 0

    def batches(self, count: int) -> list[Request]:
        """The next ``count`` batches in one list; each holds as many requests as there are tenants."""
        requests: list[Request] = []
        for _ in range(count):
            names = list(self._tenants)
            self._draw.shuffle(names)
            requests.extend(Request(name, self._next_text(self._tenants[name])) for name in names)
        return requests

    def num_fresh_batches(self) -> int:
        """How many more batches there are before a text comes again."""
        per_batch = list(self._tenants.values())
        return min(self._num_unused[domain] // per_batch.count(domain) for domain in set(per_batch))

    def _next_text(self, domain: str) -> str:
        self.num_repeated += self._num_unused[domain] <= 0
        self._num_unused[domain] -= 1
        return next(self._texts[domain])


def cut_to_tokens(texts: Sequence[str], encoder: TextEncoder, max_tokens: int) -> list[str]:
    """Cuts whole words from the ends of texts until each has at most ``max_tokens`` tokens.

    So no system truncates, and all compute the same tokens.
    """
    result = list(texts)
    pending = list(range(len(result)))
    while pending:
        lengths = [len(ids) for ids in encoder.token_ids([result[index] for index in pending])]
        pending = [index for index, length in zip(pending, lengths, strict=True) if length > max_tokens]
        for index in pending:
            shorter, _, _ = result[index].rpartition(" ")
            result[index] = shorter or result[index][: len(result[index]) // 2]
    return result
