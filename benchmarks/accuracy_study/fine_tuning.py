"""Fine-tuning with the heads of transformers, of all weights or by PEFT: what tenants are compared with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from seqeval.metrics import f1_score
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

from benchmarks.accuracy_study.pieces import cut_sentences, join_tags
from benchmarks.accuracy_study.records import LabelOutcomes, Outcome, TagOutcomes
from benchmarks.accuracy_study.sets import ClassificationSet, StudySet, TaggingSet
from hmi_engine.construct.objectives.token_classification import OUTSIDE
from hmi_engine.construct.training_data import length_batches
from hmi_engine.knowledge.examples import Example, TaggedExample

__all__ = ["FineTuning", "fine_tune"]

IGNORED = -100
"""Target of tokens that carry no tag: padding, special tokens, and all but the first of a word."""
TEXTS_PER_PREDICTION = 64
MAX_GRADIENT_NORM = 1.0
WARMUP_FRACTION = 0.1
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class FineTuning:
    """The recipe: AdamW, linear warm-up over a tenth of the steps and linear decay, the best epoch kept.

    With ``lora_rank``, the base stays as it is, and PEFT's LoRA on query and value of every layer is trained;
    with ``frozen_layers``, the embeddings and so many of the lowest layers stay.
    """

    learning_rate: float
    epochs: int
    batch_size: int
    max_tokens: int
    lora_rank: int | None = None
    frozen_layers: int = 0


@dataclass(frozen=True)
class _Encoded:
    """Token ids of each text, and what the loss compares with: a label number, or one for each token."""

    token_ids: list[list[int]]
    targets: list[Any]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text."""
        return [len(ids) for ids in self.token_ids]

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The texts ``numbers`` as a model of transformers takes them, padded to the longest."""
        ids = [torch.tensor(self.token_ids[number]) for number in numbers]
        targets = [torch.tensor(self.targets[number]) for number in numbers]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED)
            if targets[0].dim()
            else torch.stack(targets),
        }


def fine_tune(
    base: Path, labelled: StudySet, recipe: FineTuning, seed: int, *, save: Path | None = None
) -> Outcome:
    """Trains all weights of the model in the folder ``base`` and a head on one set.

    The epoch with the best accuracy or entity F1 on the development split is scored on the test split.
    Sentences with tags that are longer than ``recipe.max_tokens`` are cut into pieces; texts with one label
    are cut off. The model of that epoch goes into the folder ``save``, as a teacher of tenants.
    """
    started = time.process_time()
    torch.manual_seed(seed)
    task: _Classification | _Tagging
    if isinstance(labelled, ClassificationSet):
        task = _Classification(base, labelled, recipe.max_tokens)
    else:
        task = _Tagging(base, labelled, recipe.max_tokens)
    model: Any = task.new_model()
    if recipe.lora_rank is not None:
        model = _with_lora(model, recipe.lora_rank)
    if recipe.frozen_layers:
        _freeze(model, recipe.frozen_layers)
    by_epoch: list[float] = []
    best: dict[str, Tensor] = {}
    for _ in _epochs(model, task.train, recipe, torch.Generator().manual_seed(seed)):
        by_epoch.append(task.measure(_predict(model, task.dev)))
        if by_epoch[-1] > max(by_epoch[:-1], default=-1.0):
            best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(best)
    if save is not None:
        model.config.id2label = dict(enumerate(labelled.labels))
        model.config.label2id = {label: number for number, label in enumerate(labelled.labels)}
        model.save_pretrained(save)
        AutoTokenizer.from_pretrained(base).save_pretrained(save)
    outcomes = task.outcomes(_predict(model, task.test))
    return Outcome(tuple(by_epoch), outcomes, time.process_time() - started)


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    """The head is trained as well, and the pooler where it has one."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    head = [name for name in ("classifier", "pooler") if name in names]
    targets = ["query", "value"]
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, modules_to_save=head)
    )


def _freeze(model: Any, num_layers: int) -> None:
    lowest = [model.base_model.embeddings, *model.base_model.encoder.layer[:num_layers]]
    for module in lowest:
        module.requires_grad_(requires_grad=False)


def _epochs(
    model: nn.Module, data: _Encoded, recipe: FineTuning, generator: torch.Generator
) -> Iterator[None]:
    """Trains one epoch after another."""
    steps = recipe.epochs * -(-len(data.token_ids) // recipe.batch_size)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        fused=True,
    )
    schedule = get_linear_schedule_with_warmup(optimizer, round(steps * WARMUP_FRACTION), steps)
    for _ in range(recipe.epochs):
        model.train()
        for numbers in length_batches(range(len(data.token_ids)), data.lengths, recipe.batch_size, generator):
            optimizer.zero_grad()
            model(**data.batch(numbers)).loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
        yield


@torch.inference_mode()
def _predict(model: nn.Module, data: _Encoded) -> list[list[int]] | list[int]:
    """The best class of each text, or of each of its tokens, in the order of ``data``."""
    model.eval()
    lengths = data.lengths
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    found: dict[int, Any] = {}
    for start in range(0, len(order), TEXTS_PER_PREDICTION):
        numbers = order[start : start + TEXTS_PER_PREDICTION]
        found |= zip(numbers, model(**data.batch(numbers)).logits.argmax(-1).tolist(), strict=True)
    return [found[number] for number in range(len(lengths))]


class _Classification:
    """One label for each text."""

    def __init__(self, base: Path, labelled: ClassificationSet, max_tokens: int) -> None:
        self._base, self._max_tokens, self._labels = base, max_tokens, labelled.labels
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        self.train, self.dev, self.test = map(self._encode, (labelled.train, labelled.dev, labelled.test))

    def new_model(self) -> nn.Module:
        """The base with a new head."""
        return AutoModelForSequenceClassification.from_pretrained(self._base, num_labels=len(self._labels))

    def _encode(self, examples: Sequence[Example]) -> _Encoded:
        texts = [example.text for example in examples]
        tokens = self._tokenizer(texts, truncation=True, max_length=self._max_tokens)
        return _Encoded(tokens["input_ids"], [self._labels.index(example.label) for example in examples])

    def measure(self, answers: Sequence[Any]) -> float:
        """Accuracy on the development split."""
        right = sum(answer == target for answer, target in zip(answers, self.dev.targets, strict=True))
        return right / len(answers)

    def outcomes(self, answers: Sequence[Any]) -> LabelOutcomes:
        """What was answered on the test split."""
        return LabelOutcomes(answers=tuple(answers))


class _Tagging:
    """One tag for each word, which its first token carries."""

    def __init__(self, base: Path, labelled: TaggingSet, max_tokens: int) -> None:
        self._base, self._max_tokens, self._tags = base, max_tokens, labelled.labels
        self._tokenizer = AutoTokenizer.from_pretrained(base)
        train, self._dev, self._test = (
            cut_sentences(split, self._tokenizer, max_tokens)
            for split in (labelled.train, labelled.dev, labelled.test)
        )
        self.train, self.dev, self.test = map(self._encode, (train, self._dev, self._test))

    def new_model(self) -> nn.Module:
        """The base with a new head."""
        return AutoModelForTokenClassification.from_pretrained(self._base, num_labels=len(self._tags))

    def _encode(self, split: Sequence[Sequence[TaggedExample]]) -> _Encoded:
        pieces = _pieces(split)
        tokens = self._tokens(pieces)
        targets = [
            [
                IGNORED if word is None else self._tags.index(piece.tags[word])
                for word in _begun_words(tokens.word_ids(row))
            ]
            for row, piece in enumerate(pieces)
        ]
        return _Encoded(tokens["input_ids"], targets)

    def _tokens(self, pieces: Sequence[TaggedExample]) -> Any:
        words = [list(piece.words) for piece in pieces]
        return self._tokenizer(words, is_split_into_words=True, truncation=True, max_length=self._max_tokens)

    def measure(self, answers: Sequence[Any]) -> float:
        """Entity F1 on the development split."""
        return float(f1_score(_truth(self._dev), self._word_tags(self._dev, answers)))

    def outcomes(self, answers: Sequence[Any]) -> TagOutcomes:
        """What was answered on the test split."""
        return TagOutcomes.of(_truth(self._test), self._word_tags(self._test, answers))

    def _word_tags(self, split: Sequence[Sequence[TaggedExample]], answers: Sequence[Any]) -> list[list[str]]:
        """A tag for each word of each sentence; a word without tokens, such as a control sign, is outside."""
        pieces = _pieces(split)
        tokens = self._tokens(pieces)
        tags = [[OUTSIDE] * len(piece.words) for piece in pieces]
        for row, numbers in enumerate(answers):
            for place, word in enumerate(_begun_words(tokens.word_ids(row))):
                if word is not None:
                    tags[row][word] = self._tags[numbers[place]]
        return join_tags(split, tags)


def _pieces(split: Sequence[Sequence[TaggedExample]]) -> list[TaggedExample]:
    return [piece for sentence in split for piece in sentence]


def _truth(split: Sequence[Sequence[TaggedExample]]) -> list[list[str]]:
    return join_tags(split, [piece.tags for piece in _pieces(split)])


def _begun_words(words: Sequence[int | None]) -> list[int | None]:
    """For each token the word that begins there, None inside of words and at special tokens."""
    before = [None, *words[:-1]]
    return [word if word != previous else None for word, previous in zip(words, before, strict=True)]
