"""Examples as token ids and targets, split and batched: what all tasks have in common."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hmi_engine.errors import TrainingDataError
from hmi_engine.models.tokenization import TextEncoder

__all__ = [
    "EncodedTexts",
    "Split",
    "TaskData",
    "WordPlaces",
    "encode_texts",
    "first_inside",
    "length_batches",
    "random_split",
    "stratified_split",
]

BATCHES_PER_BUCKET = 8


@dataclass(frozen=True)
class EncodedTexts:
    """Texts and their tokens.

    Attributes:
        texts: as given.
        full_ids: token ids as a corpus is counted: of the whole text.
        token_ids: the same, cut to the training's ``max_tokens`` and to the model's positions.
    """

    texts: tuple[str, ...]
    full_ids: list[list[int]]
    token_ids: list[list[int]]

    @property
    def num_cut(self) -> int:
        """How many texts were longer than that."""
        pairs = zip(self.full_ids, self.token_ids, strict=True)
        return sum(len(full) > len(cut) for full, cut in pairs)


def encode_texts(texts: Sequence[str], encoder: TextEncoder, max_tokens: int) -> EncodedTexts:
    """Tokenizes texts and cuts them to ``max_tokens``, and to the positions that the model has."""
    full_ids = encoder.token_ids(list(texts), whole=True)
    limit = min(max_tokens, encoder.max_tokens)
    return EncodedTexts(tuple(texts), full_ids, [_cut(ids, limit) for ids in full_ids])


def _cut(ids: list[int], max_tokens: int) -> list[int]:
    """At most ``max_tokens``, the closing special token kept: what the tokenizer's own truncation gives."""
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


@dataclass(frozen=True)
class WordPlaces:
    """Tokens of a batch whose hidden states a head reads one by one.

    Attributes:
        sequences: int64 [W], the number of the sequence in the batch.
        places: int64 [W], the token's place in it.
    """

    sequences: Tensor
    places: Tensor


@dataclass(frozen=True)
class TaskData:
    """Examples in their order, encoded.

    Attributes:
        encoded: the texts that they read.
        targets: what is to be said of each example, [rows, ...]; the objective that made them knows what
            they mean. The targets of a batch are these, one after another.
        readings: for each example, the numbers of the texts that it reads. A text that is all of an example
            has its number; pairs have two or three.
        words: for each text, int64 places of the tokens that a head of words reads; None for other heads.
        spans: for each text, first and one-past-last character of these words; None where ``words`` is.
        sha256: digest of the examples in their order, in hex.
    """

    encoded: EncodedTexts
    targets: Sequence[Tensor]
    readings: Sequence[tuple[int, ...]]
    sha256: str
    words: Sequence[Tensor] | None = None
    spans: Sequence[Sequence[tuple[int, int]]] | None = None

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.readings)

    def followed_by(self, other: TaskData) -> TaskData:
        """These examples, and those of ``other`` behind them; the digest stays that of these."""
        first, second = self.encoded, other.encoded
        shift = len(first.texts)
        return TaskData(
            encoded=EncodedTexts(
                first.texts + second.texts,
                first.full_ids + second.full_ids,
                first.token_ids + second.token_ids,
            ),
            targets=[*self.targets, *other.targets],
            readings=[*self.readings, *(tuple(text + shift for text in each) for each in other.readings)],
            sha256=self.sha256,
            words=None if self.words is None or other.words is None else [*self.words, *other.words],
            spans=None if self.spans is None or other.spans is None else [*self.spans, *other.spans],
        )

    def batch_texts(self, numbers: Sequence[int]) -> list[int]:
        """Texts that the examples ``numbers`` read: all the first ones, then the second ones, and so on."""
        columns = max((len(self.readings[number]) for number in numbers), default=0)
        return [
            self.readings[number][column]
            for column in range(columns)
            for number in numbers
            if column < len(self.readings[number])
        ]

    def batch_targets(self, numbers: Sequence[int]) -> Tensor:
        """The targets of the examples ``numbers``, one after another."""
        return torch.cat([self.targets[number] for number in numbers])

    def batch_words(self, texts: Sequence[int]) -> WordPlaces | None:
        """Where the words of ``texts`` are in a batch of them; None where the head reads no single words."""
        if self.words is None:
            return None
        places = [self.words[text] for text in texts]
        counts = torch.tensor([len(found) for found in places])
        return WordPlaces(torch.repeat_interleave(torch.arange(len(texts)), counts), torch.cat(places))

    def lengths(self) -> list[int]:
        """Tokens of each example's longest text."""
        ids = self.encoded.token_ids
        return [max(len(ids[text]) for text in reading) for reading in self.readings]


@dataclass(frozen=True)
class Split:
    """Numbers of the examples to learn from and of those held out, each ascending."""

    training: tuple[int, ...]
    validation: tuple[int, ...]


def stratified_split(
    targets: Sequence[int], num_labels: int, fraction: float, generator: torch.Generator
) -> Split:
    """Holds out ``fraction`` of each label's examples at random, at least one, and leaves at least one.

    A label's only example is learned from. ``targets`` are numbers below ``num_labels``.

    Raises:
        TrainingDataError: no label has a second example.
    """
    members: list[list[int]] = [[] for _ in range(num_labels)]
    for index, target in enumerate(targets):
        members[target].append(index)
    validation = [index for own in members if len(own) > 1 for index in _draw(own, fraction, generator)]
    if not validation:
        raise TrainingDataError(
            f"each of the {num_labels} labels has a single example; give more, some of which are held out, "
            "or a validation set of its own"
        )
    return _split(len(targets), validation)


def random_split(num_examples: int, fraction: float, generator: torch.Generator) -> Split:
    """Holds out ``fraction`` of the examples at random, at least one, and leaves at least one.

    Raises:
        TrainingDataError: there are fewer than two.
    """
    if num_examples < 2:
        raise TrainingDataError(
            f"there is only {num_examples} training example; give at least two, one of which is held out, or "
            "a validation set of its own"
        )
    return _split(num_examples, _draw(range(num_examples), fraction, generator))


def _draw(members: Sequence[int], fraction: float, generator: torch.Generator) -> list[int]:
    held_out = min(max(1, round(len(members) * fraction)), len(members) - 1)
    order = torch.randperm(len(members), generator=generator)[:held_out].tolist()
    return [members[place] for place in order]


def _split(num_examples: int, validation: Sequence[int]) -> Split:
    held = set(validation)
    return Split(tuple(index for index in range(num_examples) if index not in held), tuple(sorted(held)))


def length_batches(
    numbers: Sequence[int], lengths: Sequence[int], batch_size: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Shuffles ``numbers`` into batches of texts of similar length, so that padding stays small.

    Shuffled runs of several batches are sorted by length and cut, and the batches are shuffled again.
    """
    order = [numbers[place] for place in torch.randperm(len(numbers), generator=generator).tolist()]
    batches = []
    for start in range(0, len(order), batch_size * BATCHES_PER_BUCKET):
        bucket = sorted(
            order[start : start + batch_size * BATCHES_PER_BUCKET], key=lambda number: lengths[number]
        )
        batches += [bucket[first : first + batch_size] for first in range(0, len(bucket), batch_size)]
    for place in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[place]


def first_inside(spans: Sequence[tuple[int, int]], begins: Sequence[int]) -> list[int | None]:
    """For each span, which of the ascending ``begins`` is the first inside it; None where none is."""
    places = [bisect_left(begins, start) for start, _ in spans]
    return [
        place if place < len(begins) and begins[place] < end else None
        for place, (_, end) in zip(places, spans, strict=True)
    ]
