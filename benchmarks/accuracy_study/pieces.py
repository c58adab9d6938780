"""Tagged sentences cut at words, so that no word is lost where a model takes a limited number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from hmi_engine.knowledge.examples import TaggedExample

__all__ = ["cut_sentences", "join_tags"]

NUM_SPECIAL_TOKENS = 2
"""The first and the last token of a sequence."""


def cut_sentences(
    sentences: Sequence[TaggedExample], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[list[TaggedExample]]:
    """Cuts each sentence into pieces of at most ``max_tokens`` with special tokens, as long as possible.

    A single word of more tokens than that is a piece of its own.
    """
    room = max_tokens - NUM_SPECIAL_TOKENS
    words = sorted({word for sentence in sentences for word in sentence.words})
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    num_tokens = {word: len(tokens) for word, tokens in zip(words, ids, strict=True)}
    return [
        [
            TaggedExample(sentence.words[start:stop], sentence.tags[start:stop])
            for start, stop in _stretches([num_tokens[word] for word in sentence.words], room)
        ]
        for sentence in sentences
    ]


def _stretches(sizes: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    start = used = 0
    for place, size in enumerate(sizes):
        if place > start and used + size > room:
            yield start, place
            start, used = place, 0
        used += size
    yield start, len(sizes)


def join_tags(pieces: Sequence[Sequence[TaggedExample]], tags: Sequence[Sequence[str]]) -> list[list[str]]:
    """The tags of whole sentences from those of their pieces, which stand one after another in ``tags``."""
    remaining = iter(tags)
    return [[tag for _ in sentence for tag in next(remaining)] for sentence in pieces]
