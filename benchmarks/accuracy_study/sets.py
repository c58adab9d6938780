"""The labelled sets of the accuracy study: texts with a label, and sentences whose words have tags."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from hmi_engine.construct.objectives.token_classification import sentence_text
from hmi_engine.demo.tasks import DemoData, Task, documentation_data
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.corpus_examples import stream_task_examples
from hmi_engine.knowledge.corpus_report import CorpusReport
from hmi_engine.knowledge.examples import Example, TaggedExample

__all__ = ["ClassificationSet", "StudySet", "TaggingSet", "demo_sets", "read_sets", "study_sets"]

SPLITS = ("train", "dev", "test")
DEV_SHARE_OF_DEMO = 6
"""One of so many training texts of a set without a development split serves as one."""


Item = TypeVar("Item", Example, TaggedExample)


@dataclass(frozen=True)
class _Splits(Generic[Item]):
    """A set: what is learned from, what chooses (epochs, learning rates), and what is only scored."""

    name: str
    train: tuple[Item, ...]
    dev: tuple[Item, ...]
    test: tuple[Item, ...]

    def training_texts(self) -> tuple[str, ...]:
        """Distinct texts of the training split, in order."""
        return tuple(dict.fromkeys(map(_text, self.train)))

    def held_out_texts(self) -> frozenset[str]:
        """Texts of the development and test splits."""
        return frozenset(map(_text, (*self.dev, *self.test)))


def _text(item: Example | TaggedExample) -> str:
    return item.text if isinstance(item, Example) else sentence_text(item.words)


class ClassificationSet(_Splits[Example]):
    """One label for each text."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the training split, sorted."""
        return tuple(sorted({example.label for example in self.train}))


class TaggingSet(_Splits[TaggedExample]):
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
        TrainingDataError: there is no such folder, a line of JSON has no text or label, or a held-out label
            or tag is none of the training split's.
        CorpusError: a line has a word and no tag.
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
    with paths[0].open(encoding="utf-8") as file:
        is_json = file.read(1) == "{"
    labelled: StudySet
    if is_json:
        labelled = ClassificationSet(folder.name, *(tuple(_labelled_texts(path)) for path in paths))
    else:
        labelled = TaggingSet(folder.name, *(tuple(_tagged_sentences(path)) for path in paths))
    _check_held_out_labels(labelled)
    return labelled


def _labelled_texts(path: Path) -> Iterable[Example]:
    report = CorpusReport()
    for example in stream_task_examples(path, "classification", file_format="jsonl", report=report):
        assert isinstance(example, Example)
        yield example
    if report.bad_lines:
        # A set that is compared with what others measured on it is whole or not used.
        raise TrainingDataError(str(report.bad_lines[0]))


def _tagged_sentences(path: Path) -> Iterable[TaggedExample]:
    for example in stream_task_examples(path, "token_classification", file_format="conll"):
        assert isinstance(example, TaggedExample)
        yield example


def _check_held_out_labels(labelled: StudySet) -> None:
    found = {
        label
        for item in (*labelled.dev, *labelled.test)
        for label in ([item.label] if isinstance(item, Example) else item.tags)
    }
    if unknown := found - set(labelled.labels):
        raise TrainingDataError(
            f"set {labelled.name}: the label {min(unknown)!r:.60} of held-out texts is in no training text"
        )


def study_sets(data: Path | None, *, quick: bool) -> Sequence[StudySet]:
    """The sets of a folder; without one the demo's tasks, with ``quick`` little of them."""
    if data is not None:
        return read_sets(data)
    if quick:
        return demo_sets(documentation_data(num_topics=1, background_words=0, max_train=200, max_test=100))
    return demo_sets(documentation_data())


def demo_sets(data: DemoData) -> list[ClassificationSet]:
    """The demo's tasks on the documentation of installed packages; part of the training text becomes dev."""
    return [_demo_set(task) for task in data.tasks]


def _demo_set(task: Task) -> ClassificationSet:
    dev = task.train[::DEV_SHARE_OF_DEMO]
    train = tuple(example for number, example in enumerate(task.train) if number % DEV_SHARE_OF_DEMO)
    return ClassificationSet(task.name.replace("/", "-"), train, dev, task.test)
