"""Labelled texts as token ids and label numbers, split and batched."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.corpus import Example
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["LabelledTexts", "Split", "encode_examples", "length_batches", "stratified_split"]

BATCHES_PER_BUCKET = 8


@dataclass(frozen=True)
class LabelledTexts:
    """Examples in their order.

    Attributes:
        texts: as given.
        full_ids: token ids as a corpus is counted: of the whole text.
        token_ids: the same, cut to the training's ``max_tokens`` and to the model's positions.
        targets: label numbers.
        labels: names of the labels by number, sorted.
    """

    texts: tuple[str, ...]
    full_ids: list[list[int]]
    token_ids: list[list[int]]
    targets: tuple[int, ...]
    labels: tuple[str, ...]

    def sha256(self) -> str:
        """Digest of texts and labels in their order, in hex."""
        digest = hashlib.sha256()
        for text, target in zip(self.texts, self.targets, strict=True):
            digest.update(json.dumps([text, self.labels[target]]).encode() + b"\n")
        return digest.hexdigest()

    @property
    def majority(self) -> int:
        """The most frequent label, the first of them in a tie."""
        counts = Counter(self.targets)
        return max(sorted(counts), key=lambda label: counts[label])


def encode_examples(
    examples: Sequence[Example],
    encoder: TextEncoder,
    max_tokens: int,
    labels: tuple[str, ...] | None = None,
) -> LabelledTexts:
    """Tokenizes examples; ``labels`` fixes the labels where an existing head is to be tested.

    Raises:
        TrainingDataError: nothing to train on, an empty text or label, or a label that is not in ``labels``.
    """
    if not examples:
        raise TrainingDataError("there are no training examples; give at least two for each of two labels")
    for example in examples:
        if not example.text.strip() or not example.label.strip():
            raise TrainingDataError(f"line {example.line}: text and label must not be empty")
    found = tuple(sorted({example.label for example in examples}))
    names = found if labels is None else labels
    if unknown := set(found) - set(names):
        raise TrainingDataError(
            f"test examples have the label {min(unknown)!r:.80}, which no training example has"
        )
    numbers = {label: number for number, label in enumerate(names)}
    full_ids = encoder.token_ids([example.text for example in examples], whole=True)
    return LabelledTexts(
        texts=tuple(example.text for example in examples),
        full_ids=full_ids,
        token_ids=[_cut(ids, min(max_tokens, encoder.max_tokens)) for ids in full_ids],
        targets=tuple(numbers[example.label] for example in examples),
        labels=names,
    )


def _cut(ids: list[int], max_tokens: int) -> list[int]:
    """At most ``max_tokens``, the closing special token kept: what the tokenizer's own truncation gives."""
    return ids if len(ids) <= max_tokens else [*ids[: max_tokens - 1], ids[-1]]


@dataclass(frozen=True)
class Split:
    """Numbers of the examples to learn from and of those held out, each ascending."""

    training: tuple[int, ...]
    validation: tuple[int, ...]


def stratified_split(data: LabelledTexts, fraction: float, generator: torch.Generator) -> Split:
    """Holds out ``fraction`` of each label's examples at random, at least one, and leaves at least one.

    Raises:
        TrainingDataError: fewer than two labels, or a label with a single example.
    """
    if len(data.labels) < 2:
        raise TrainingDataError(
            f"all {len(data.texts)} examples have the label {data.labels[0]!r:.80}; a classifier needs two"
        )
    validation: list[int] = []
    for number, label in enumerate(data.labels):
        members = [index for index, target in enumerate(data.targets) if target == number]
        if len(members) < 2:
            raise TrainingDataError(
                f"label {label!r:.80} has a single example; give at least two, one of which is held out"
            )
        held_out = min(max(1, round(len(members) * fraction)), len(members) - 1)
        order = torch.randperm(len(members), generator=generator)[:held_out].tolist()
        validation.extend(members[place] for place in order)
    held = set(validation)
    training = tuple(index for index in range(len(data.texts)) if index not in held)
    return Split(training, tuple(sorted(held)))


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
