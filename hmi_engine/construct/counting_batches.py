"""Texts to batches of token ids, tokenised in the background while the batch before is counted."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from hmi_engine.construct.counting_tokens import TokenizeTexts, corpus_tokenizer
from hmi_engine.knowledge.plot_table import text_digest
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["TokenBatch", "tokenized_batches"]

TEXTS_PER_BATCH = 4096
CHARACTERS_PER_BATCH = 1 << 20
"""A batch ends with the text that reaches one of these; its tokens take some tens of MiB in the making."""

_BATCHES_AHEAD = 2


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Some texts' tokens.

    Attributes:
        input_ids: int32 [T], the sequences laid end to end.
        offsets: int64 [S + 1]; sequence s owns tokens ``offsets[s]`` to ``offsets[s + 1]``.
        digests: int64 [texts], see :func:`~hmi_engine.knowledge.plot_table.text_digest`.
    """

    input_ids: torch.Tensor
    offsets: torch.Tensor
    digests: npt.NDArray[np.int64]


def tokenized_batches(texts: Iterable[str], encoder: TextEncoder) -> Generator[TokenBatch, None, None]:
    """Yields the tokens of all texts, in order; a thread tokenises ahead of the consumer.

    The tokenizer releases the interpreter's lock and has threads of its own, and so has the n-gram counter:
    both work at the same time. What ``texts`` raises comes out here. Close the iterator where it is left
    early: that waits for the thread.
    """
    tokenize = corpus_tokenizer(encoder)
    pending: deque[Future[TokenBatch]] = deque()
    with ThreadPoolExecutor(1, "hmi-tokenize") as executor:
        try:
            for batch in _text_batches(texts):
                pending.append(executor.submit(_tokenize, batch, tokenize))
                if len(pending) > _BATCHES_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _text_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if len(batch) >= TEXTS_PER_BATCH or characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _tokenize(texts: list[str], tokenize: TokenizeTexts) -> TokenBatch:
    input_ids, offsets = tokenize(texts)
    digests = np.fromiter(map(text_digest, texts), np.int64, len(texts))
    return TokenBatch(torch.from_numpy(input_ids), torch.from_numpy(offsets), digests)
