"""The labelled sets of the accuracy study: texts with a label, and sentences whose words have tags."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from hmi_engine.demo.tasks import DemoData, Task
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.corpus import Example

__all__ = [
    "ClassificationSet",
    "StudySet",
    "TaggedSentence",
    "TaggingSet",
    "demo_sets",
    "read_sets",
]

SPLITS = ("train", "dev", "test")
DEV_SHARE_OF_DEMO = 6
"""One of so many training texts of a set without a development split serves as one."""


@dataclass(frozen=True)
class TaggedSentence:
    """The words of a sentence and a tag for each, such as ``B-Method``, ``I-Method`` or ``O``."""

    words: tuple[str, ...]
    tags: tuple[str, ...]

    @property
    def text(self) -> str:
        """The words with spaces between them."""
        return " ".join(self.words)


Item = TypeVar("Item", Example, TaggedSentence)


@dataclass(frozen=True)
class _Splits(Generic[Item]):
    """A set: what is learned from, what chooses (epochs, learning rates), and what is only scored."""

    name: str
    train: tuple[Item, ...]
    dev: tuple[Item, ...]
    test: tuple[Item, ...]

    def training_texts(self) -> tuple[str, ...]:
        """Distinct texts of the training split, in order."""
        return tuple(dict.fromkeys(item.text for item in self.train))

    def held_out_texts(self) -> frozenset[str]:
        """Texts of the development and test splits."""
        return frozenset(item.text for item in (*self.dev, *self.test))


class ClassificationSet(_Splits[Example]):
    """One label for each text."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the training split, sorted."""
        return tuple(sorted({example.label for example in self.train}))


class TaggingSet(_Splits[TaggedSentence]):
    """One tag for each word, which together mark entities (BIO)."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The tags of the training split, sorted."""
        return tuple(sorted({tag for sentence in self.train for tag in sentence.tags}))


StudySet = ClassificationSet | TaggingSet


def read_sets(folder: Path) -> list[StudySet]:
    """Reads every folder below ``folder`` that has ``train.txt``, ``dev.txt`` and ``test.txt``, by name.

    The files hold JSON lines with the fields ``text`` and ``label``, or one word a line, its tag the last
    field of the line, and a blank line after each sentence.

    Raises:
        TrainingDataError: there is no such folder, a line is neither, or a held-out label or tag is none of
            the training split's.
    """
    found = sorted(
        path.parent
        for path in folder.glob("*/train.txt")
        if all(path.with_name(f"{split}.txt").is_file() for split in SPLITS)
    )
    if not found:
        raise TrainingDataError(f"{folder} has no folder with train.txt, dev.txt and test.txt")
    return [_read_set(path) for path in found]


def _read_set(folder: Path) -> StudySet:
    paths = [folder / f"{split}.txt" for split in SPLITS]
    if _lines(paths[0])[0].startswith("{"):
        return _checked(ClassificationSet(folder.name, *(tuple(_examples(path)) for path in paths)))
    return _checked(TaggingSet(folder.name, *(tuple(_sentences(path)) for path in paths)))


def _lines(path: Path) -> list[str]:
    # str.splitlines would also cut at the rarer separators that stand inside some of the texts.
    return path.read_text(encoding="utf-8").split("\n")


def _examples(path: Path) -> Iterator[Example]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
            yield Example(fields["text"], fields["label"], number)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise TrainingDataError(
                f"{path}, line {number}: {line!r:.60} is no JSON object with the fields text and label"
            ) from error


def _sentences(path: Path) -> Iterator[TaggedSentence]:
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*_lines(path), ""], start=1):
        fields = line.split()
        if len(fields) == 1:
            raise TrainingDataError(f"{path}, line {number}: {line!r:.60} has no tag after its word")
        if fields:
            words.append(fields[0])
            tags.append(fields[-1])
        elif words:
            yield TaggedSentence(tuple(words), tuple(tags))
            words, tags = [], []


def _checked(labelled: StudySet) -> StudySet:
    known = set(labelled.labels)
    held_out = (*labelled.dev, *labelled.test)
    found = {
        label
        for item in held_out
        for label in (item.tags if isinstance(item, TaggedSentence) else [item.label])
    }
    if unknown := found - known:
        raise TrainingDataError(
            f"set {labelled.name}: the label {min(unknown)!r:.60} of held-out texts is in no training text"
        )
    return labelled


def demo_sets(data: DemoData) -> list[ClassificationSet]:
    """The demo's tasks on the documentation of installed packages; part of the training text becomes dev."""
    return [_demo_set(task) for task in data.tasks]


def _demo_set(task: Task) -> ClassificationSet:
    dev = task.train[::DEV_SHARE_OF_DEMO]
    train = tuple(example for number, example in enumerate(task.train) if number % DEV_SHARE_OF_DEMO)
    return ClassificationSet(task.name.replace("/", "-"), train, dev, task.test)
