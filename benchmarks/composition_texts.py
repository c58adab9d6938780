"""The labelled texts of the composition study, and which of their n-grams a table would hold."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.construct.objectives.classification import ClassificationObjective
from hmi_engine.construct.training_data import TaskData
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.demo.tasks import documentation_data
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.examples import Example
from hmi_engine.models.packing import PackedSequences
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["Frequencies", "Sizes", "StudyTexts", "TextSet", "documentation_sets", "folder_sets", "prepare"]

FOLDS = 5
MIN_EXAMPLES_PER_LABEL = 8
NO_FOLD = -1


@dataclass(frozen=True)
class Sizes:
    """How much of each set the study takes: training texts, held-out texts, tokens of a text."""

    train: int
    test: int
    max_tokens: int


@dataclass(frozen=True)
class TextSet:
    """One task: labelled texts to learn from, held-out ones, and the corpus that its table is built from.

    ``train`` are texts of the ``corpus``; no text of ``test`` is.
    """

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    corpus: tuple[str, ...]


def folder_sets(folder: Path, sizes: Sizes) -> list[TextSet]:
    """The sets ``NAME/train.txt``, ``NAME/dev.txt``, ``NAME/test.txt`` (JSON lines ``text``, ``label``).

    The whole training split is the corpus. Nothing is chosen on ``dev``, so it counts as held out.

    Raises:
        TrainingDataError: the folder holds no such set.
    """
    found = []
    for path in sorted(folder.glob("*/train.txt")):
        if path.read_text(encoding="utf-8").startswith("{"):
            held_out = [*_read(path.with_name("test.txt")), *_read(path.with_name("dev.txt"))]
            found.append(_text_set(path.parent.name, _read(path), held_out, sizes))
    if not found:
        raise TrainingDataError(f"{folder}: no NAME/train.txt of JSON lines with text and label")
    return found


def documentation_sets(sizes: Sizes, *, num_topics: int) -> list[TextSet]:
    """The demo's tasks on the installed packages' documentation strings: which group a text is listed in."""
    data = documentation_data(num_topics=num_topics, background_words=0)
    corpora = {domain.name: domain.texts for domain in data.domains}
    groups = [task for task in data.tasks if task.name.endswith("/group")]
    return [
        _text_set(task.name, task.train, task.test, sizes, extra_corpus=corpora[task.domain])
        for task in groups
    ]


def _read(path: Path) -> list[Example]:
    lines = path.read_text(encoding="utf-8").splitlines()
    parsed = [json.loads(line) for line in lines if line.strip()]
    return [Example(item["text"], item["label"], number) for number, item in enumerate(parsed, start=1)]


def _text_set(
    name: str,
    train: Sequence[Example],
    held_out: Sequence[Example],
    sizes: Sizes,
    *,
    extra_corpus: Sequence[str] = (),
) -> TextSet:
    """Draws the examples; a label too rare to be learned from the drawn ones is left out of both sides."""
    held_out_texts = {example.text for example in held_out}
    distinct = {example.text: example for example in train if example.text not in held_out_texts}
    drawn = _draw(list(distinct.values()), sizes.train)
    frequent = {
        label
        for label, count in Counter(example.label for example in drawn).items()
        if count >= MIN_EXAMPLES_PER_LABEL
    }
    return TextSet(
        name,
        tuple(example for example in drawn if example.label in frequent),
        tuple(_draw([example for example in held_out if example.label in frequent], sizes.test)),
        tuple(dict.fromkeys([*distinct, *(text for text in extra_corpus if text not in held_out_texts)])),
    )


def _draw(examples: Sequence[Example], count: int) -> list[Example]:
    return random.Random(0).sample(examples, min(count, len(examples)))


@dataclass(frozen=True)
class Frequencies:
    """What a corpus holds of the n-grams around T tokens, the tokens' own fold of the corpus left out.

    Attributes:
        keys: int64 [T], the n-gram's key; 0 where there is none.
        counts: int64 [T], occurrences in the corpus without the text's own fold (cross-fitting: a training
            text must not find the n-grams that it brought along itself).
        all_counts: int64 [n], of the n-grams in the corpus, in descending order.
    """

    keys: Tensor
    counts: Tensor
    all_counts: Tensor

    def held(self, min_count: int = 2) -> Tensor:
        """Bool [T]: which n-grams a table of those seen at least so often would have."""
        return (self.keys != 0) & (self.counts >= min_count)

    def held_at_random(self, rate: float) -> Tensor:
        """Bool [T]: each distinct n-gram is there with this probability, the same wherever it occurs.

        An n-gram that a lower rate holds is held by each higher one.
        """
        mixed = (self.keys * 0x2545F4914F6CDD1D) ^ ((self.keys * 0x2545F4914F6CDD1D) >> 29)
        uniform = ((mixed * 0x1F123BB5159A55E5) >> 40 & 0xFFFFFF).double() / (1 << 24)
        return (self.keys != 0) & (uniform < rate)


@dataclass(frozen=True)
class StudyTexts:
    """The tokens of one set, training texts first, and the n-grams around each token.

    Attributes:
        name: of the set.
        objective: the labels of the training texts.
        train: the training texts.
        test: the held-out texts.
        sequences: all of them, cut to the study's tokens, one after another.
        tokens_in_training: bool [T].
        corpus_tokens: tokens of the corpus.
        pairs: of the bigram that starts at each token.
        triples: of the trigram around each token; at a text's ends, and in ``pairs``, key 0 where absent.
    """

    name: str
    objective: ClassificationObjective
    train: TaskData
    test: TaskData
    sequences: PackedSequences
    tokens_in_training: Tensor
    corpus_tokens: int
    pairs: Frequencies
    triples: Frequencies


def prepare(texts: TextSet, encoder: TextEncoder, sizes: Sizes) -> StudyTexts:
    """Tokenizes a set and counts its corpus in folds."""
    objective = ClassificationObjective.learn(texts.train, TrainingSettings())
    train = objective.encode(texts.train, encoder, sizes.max_tokens)
    test = objective.encode(texts.test, encoder, sizes.max_tokens)
    sequences = PackedSequences.pack([*train.encoded.token_ids, *test.encoded.token_ids])
    corpus = PackedSequences.pack(encoder.token_ids(list(texts.corpus)))
    fold_of_text = {text: number % FOLDS for number, text in enumerate(texts.corpus)}
    folds = torch.tensor(
        [fold_of_text.get(text, NO_FOLD) for text in (*train.encoded.texts, *test.encoded.texts)]
    )
    lengths = torch.tensor(sequences.lengths)
    is_training = torch.arange(sequences.num_sequences) < len(train)
    corpus_folds = torch.arange(corpus.num_sequences) % FOLDS
    pairs, triples = (
        _frequencies(
            _keys(sequences, order),
            folds.repeat_interleave(lengths),
            _keys(corpus, order),
            corpus_folds.repeat_interleave(torch.tensor(corpus.lengths)),
        )
        for order in (2, 3)
    )
    return StudyTexts(
        name=texts.name,
        objective=objective,
        train=train,
        test=test,
        sequences=sequences,
        tokens_in_training=is_training.repeat_interleave(lengths),
        corpus_tokens=corpus.num_tokens,
        pairs=pairs,
        triples=triples,
    )


def _keys(sequences: PackedSequences, order: int) -> Tensor:
    """Keys of the bigrams that start at the tokens, or of the trigrams around them; 0 past a text's ends."""
    left, right = neighbors(sequences)
    ids = sequences.input_ids
    tokens = torch.stack([ids, right] if order == 2 else [left, ids, right], dim=1)
    inside = (tokens >= 0).all(1)
    keys = torch.zeros(len(tokens), dtype=torch.int64)
    keys[inside] = hmi_kernels.ngram_keys(tokens[inside])
    return keys


def neighbors(sequences: PackedSequences) -> tuple[Tensor, Tensor]:
    """The token before and after each, int32 [T]; -1 where the text ends."""
    left, right = sequences.input_ids.roll(1), sequences.input_ids.roll(-1)
    left[sequences.offsets[:-1]] = -1
    right[sequences.offsets[1:] - 1] = -1
    return left, right


def _frequencies(keys: Tensor, folds: Tensor, corpus_keys: Tensor, corpus_folds: Tensor) -> Frequencies:
    inside = corpus_keys != 0
    distinct, place = torch.unique(corpus_keys[inside], return_inverse=True)
    by_fold = torch.zeros(len(distinct), FOLDS + 1, dtype=torch.int64)
    by_fold.view(-1).index_add_(
        0, place * (FOLDS + 1) + corpus_folds[inside], torch.ones_like(place)
    )  # the last column stays zero: it is the own fold of texts outside the corpus
    totals = by_fold.sum(1)
    row = torch.searchsorted(distinct, keys).clamp_(max=len(distinct) - 1)
    rest = totals[row] - by_fold[row, folds]
    return Frequencies(keys, torch.where(distinct[row] == keys, rest, 0), totals.sort(descending=True).values)
