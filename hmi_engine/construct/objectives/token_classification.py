"""A tag for each word: cross-entropy at the word's first piece, best by F1 of whole entities.

The sentence's text is its words with a space between each two. A tokenizer may split further than the data
does ("Aug-2" in three words): the first piece that begins inside a word stands for it, here as in
:func:`tags_of_words`, which reads the engine's answers. A word without a piece, or beyond the training's
``max_tokens``, is answered with the first tag.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmi_engine.construct.objectives.label_weights import balanced_weights
from hmi_engine.construct.objectives.objective import (
    IGNORED,
    Objective,
    Reading,
    TrainableHead,
    check_text,
    checked_types,
    digest_of,
    where,
)
from hmi_engine.construct.training_data import TaskData, encode_texts, first_inside
from hmi_engine.construct.training_metrics import Metrics, is_bio, measure_tags
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.examples import AnyExample, TaggedExample, Task
from hmi_engine.knowledge.heads import TokenClassificationHead
from hmi_engine.models.tokenization import TextEncoder
from hmi_engine.request import Tag

__all__ = ["OUTSIDE", "TokenClassificationObjective", "sentence_text", "tags_of_words", "word_spans"]

OUTSIDE = "O"


@dataclass(frozen=True, eq=False)
class TokenClassificationObjective(Objective):
    """A tag for each word.

    Attributes:
        labels: ``O`` first, then the sorted tags; of BIO tags each type's ``B-`` and ``I-`` though the
            examples may lack one.
        best_by: ``entity_f1``, or of tags that are not BIO ``word_accuracy``.
        label_smoothing: of the training loss.
        weights: float32 [C] of the tags in the loss; None for equal ones.
    """

    task: ClassVar[Task] = "token_classification"
    labels: tuple[str, ...]
    best_by: str
    reading: Reading = "words"
    label_smoothing: float = 0.0
    weights: Tensor | None = None

    @classmethod
    def learn(
        cls,
        examples: Sequence[AnyExample],
        settings: TrainingSettings,
        validation_examples: Sequence[AnyExample] = (),
    ) -> TokenClassificationObjective:
        """See :meth:`Objective.learn`."""
        counts = Counter(tag for example in _checked(examples) for tag in example.tags)
        if len(counts) < 2:
            raise TrainingDataError(
                f"all words of {len(examples)} sentences have the tag {next(iter(counts))!r:.80}; there is "
                "nothing to learn"
            )
        labels = _all_labels(counts)
        return cls(
            labels=labels,
            best_by="entity_f1" if is_bio(labels) else "word_accuracy",
            label_smoothing=settings.label_smoothing,
            weights=balanced_weights(counts[label] for label in labels) if settings.class_weights else None,
        )

    def encode(self, examples: Sequence[AnyExample], encoder: TextEncoder, max_tokens: int) -> TaskData:
        """See :meth:`Objective.encode`.

        The targets of a sentence are int64 [words, 2]: the number of the tag to learn, :data:`IGNORED` where
        the word has no piece (its output is the first token's, and is not looked at), and the true one.
        """
        checked = _checked(examples)
        numbers = self._numbers(checked)
        texts = [sentence_text(example.words) for example in checked]
        encoded = encode_texts(texts, encoder, max_tokens)
        targets, words = [], []
        for example, found, ids in zip(
            checked, encoder.encode(texts, words=True), encoded.token_ids, strict=True
        ):
            places = _first_pieces(example.words, found.words, len(ids) - 1)
            truth = torch.tensor([numbers[tag] for tag in example.tags])
            is_missing = torch.tensor([place is None for place in places])
            targets.append(torch.stack([truth.masked_fill(is_missing, IGNORED), truth], dim=1))
            words.append(torch.tensor([place or 0 for place in places]))
        return TaskData(
            encoded=encoded,
            targets=targets,
            readings=[(number,) for number in range(len(checked))],
            words=words,
            spans=[word_spans(example.words) for example in checked],
            sha256=digest_of([example.words, example.tags] for example in checked),
        )

    def encode_unlabelled(self, texts: Sequence[str], encoder: TextEncoder, max_tokens: int) -> TaskData:
        """See :meth:`Objective.encode_unlabelled`; the words are those that the tokenizer finds."""
        encoded = encode_texts(texts, encoder, max_tokens)
        pairs = zip(encoder.encode(list(texts), words=True), encoded.token_ids, strict=True)
        kept = [[word for word in found.words if word[0] < len(ids) - 1] for found, ids in pairs]
        return TaskData(
            encoded=encoded,
            targets=[torch.full((len(words), 2), IGNORED) for words in kept],
            readings=[(number,) for number in range(len(texts))],
            words=[torch.tensor([place for place, _, _ in words], dtype=torch.int64) for words in kept],
            spans=[[(begin, end) for _, begin, end in words] for words in kept],
            sha256=digest_of(texts),
        )

    def _numbers(self, examples: Sequence[TaggedExample]) -> dict[str, int]:
        """Numbers of the tags; raises :class:`TrainingDataError` where an example has another tag."""
        numbers = {label: number for number, label in enumerate(self.labels)}
        for number, example in enumerate(examples):
            if unknown := set(example.tags) - set(numbers):
                raise TrainingDataError(
                    f"{where(example, number)}: no training example has the tag {min(unknown)!r:.80}; the "
                    f"training tags are {', '.join(self.labels)!s:.200}"
                )
        return numbers

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of outputs [W, C] with targets int64 [W, 2], of the words that have a piece."""
        learned = targets[:, 0]
        if not bool((learned != IGNORED).any()):
            return outputs.sum() * 0.0  # nothing to learn here: the mean over no words would be NaN
        return functional.cross_entropy(
            outputs,
            learned,
            weight=self.weights,
            ignore_index=IGNORED,
            label_smoothing=self.label_smoothing,
        )

    def measure(
        self, outputs: Tensor, data: TaskData, numbers: Sequence[int], *, resamples: int, seed: int = 0
    ) -> Metrics:
        """Judges the tag of the highest output."""
        targets = data.batch_targets(numbers)
        predictions = outputs.argmax(dim=1).masked_fill(targets[:, 0] == IGNORED, 0)
        counts = [len(data.targets[number]) for number in numbers]
        truth, found = (
            [[self.labels[tag] for tag in tags.tolist()] for tags in column.split(counts)]
            for column in (targets[:, 1], predictions)
        )
        return measure_tags(truth, found, resamples=resamples, seed=seed)

    def to_head(self, head: nn.Module) -> TokenClassificationHead:
        """See :meth:`Objective.to_head`."""
        assert isinstance(head, TrainableHead)
        return TokenClassificationHead(self.labels, *head.copies())


def _checked(examples: Sequence[AnyExample]) -> list[TaggedExample]:
    checked = checked_types(examples, (TaggedExample,), "token_classification")
    for number, example in enumerate(checked):
        if len(example.words) != len(example.tags) or not example.words:
            raise TrainingDataError(
                f"{where(example, number)}: a sentence has as many tags as words, and at least one; found "
                f"{len(example.words)} words and {len(example.tags)} tags"
            )
        for value in (*example.words, *example.tags):
            check_text(value, example, number)
    return checked


def _all_labels(tags: Iterable[str]) -> tuple[str, ...]:
    found = set(tags) | {OUTSIDE}
    if is_bio(list(found)):
        types = {tag[2:] for tag in found if tag != OUTSIDE}
        found |= {f"{prefix}-{name}" for prefix in "BI" for name in types}
    return (OUTSIDE, *sorted(found - {OUTSIDE}))


def sentence_text(words: Sequence[str]) -> str:
    """The text of a sentence whose words are given."""
    return " ".join(words)


def word_spans(words: Sequence[str]) -> list[tuple[int, int]]:
    """First and one-past-last character of each word in the sentence's text."""
    ends = list(accumulate(len(word) + 1 for word in words))
    return [(end - len(word) - 1, end - 1) for word, end in zip(words, ends, strict=True)]


def _first_pieces(
    words: Sequence[str], pieces: Sequence[tuple[int, int, int]], limit: int
) -> list[int | None]:
    """For each word the place of its first token; None where it has none, or none before ``limit``."""
    found = first_inside(word_spans(words), [begin for _, begin, _ in pieces])
    places = [None if number is None else pieces[number][0] for number in found]
    return [None if place is None or place >= limit else place for place in places]


def tags_of_words(words: Sequence[str], tags: Sequence[Tag], missing: str = OUTSIDE) -> list[str]:
    """The engine's tags of a sentence's text as one tag for each of its ``words``."""
    found = first_inside(word_spans(words), [tag.start for tag in tags])
    return [missing if number is None else tags[number].label for number in found]
