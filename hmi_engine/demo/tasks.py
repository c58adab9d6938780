"""Tasks with real labels: what the demo's tenants learn, and on which held-out texts they are measured.

The labels come from the source that a documentation string was taken from, not from a person or a model:
the module group it is listed under (:mod:`hmi_engine.demo.topics`), and whether it documents a class or a
function (methods are functions). A person's own folder of JSON lines brings its own labels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmi_engine.demo.documentation import Documentation, Passage, TopicText, harvest
from hmi_engine.demo.topics import TOPICS
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.corpus_examples import stream_examples
from hmi_engine.knowledge.corpus_report import CorpusReport
from hmi_engine.knowledge.examples import Example
from hmi_engine.knowledge.names import check_name

__all__ = ["DemoData", "DomainCorpus", "Task", "documentation_data", "folder_data"]

PARENT_DOMAIN = "documentation"
MAX_LABEL_RATIO = 1.5
TEST_SHARE_OF_FOLDER = 5


@dataclass(frozen=True)
class Task:
    """A classification task of one domain: the training and held-out examples of one tenant.

    Attributes:
        name: the tenant's name.
        domain: the domain that it belongs to.
        question: what the label answers.
        train: training examples.
        test: held-out examples.
    """

    name: str
    domain: str
    question: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the training examples, sorted."""
        return tuple(sorted({example.label for example in self.train}))

    @property
    def majority_share(self) -> float:
        """Accuracy on ``test`` of always answering the label that is most frequent in ``test`` itself.

        No constant answer does better, so it is the hardest form of this baseline.
        """
        return max(Counter(example.label for example in self.test).values()) / len(self.test)


@dataclass(frozen=True)
class DomainCorpus:
    """A domain of the store and the text that its table is built from."""

    name: str
    parent: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class DemoData:
    """Domains, parents before children, and the tasks inside them."""

    source: str
    domains: tuple[DomainCorpus, ...]
    tasks: tuple[Task, ...]


def documentation_data(
    *,
    num_topics: int = len(TOPICS),
    background_words: int | None = None,
    max_train: int = 800,
    max_test: int = 300,
    max_words: int = 40,
    seed: int = 0,
) -> DemoData:
    """Two tasks for each topic of the installed documentation, and the tree of their domains.

    All topics share the parent domain ``documentation``, whose corpus is theirs together with text of
    other packages, of at most about ``background_words`` words (None: all there is). ``max_train`` and
    ``max_test`` limit each task, ``max_words`` each text.

    Raises:
        TrainingDataError: the machine has too little documentation for a task.
    """
    documentation = harvest(
        TOPICS[:num_topics], background_words=background_words, max_words=max_words, seed=seed
    )
    sampler = _Sampler(max_train, max_test, seed)
    tasks = [task for topic in documentation.topics for task in _topic_tasks(topic, sampler)]
    return DemoData(
        "documentation strings of the installed Python packages; held-out texts share no source file with "
        "training text or tables, and labels come from the source",
        _domains(documentation),
        tuple(tasks),
    )


def _domains(documentation: Documentation) -> tuple[DomainCorpus, ...]:
    common = [text for topic in documentation.topics for text in topic.corpus]
    common.extend(documentation.background)
    children = (DomainCorpus(topic.name, PARENT_DOMAIN, topic.corpus) for topic in documentation.topics)
    return (DomainCorpus(PARENT_DOMAIN, "general", tuple(dict.fromkeys(common))), *children)


@dataclass(frozen=True)
class _Sampler:
    max_train: int
    max_test: int
    seed: int

    def task(self, name: str, domain: str, question: str, *, examples: Sequence[Sequence[Example]]) -> Task:
        train, test = examples
        labels = {example.label for example in train}
        if len(labels) < 2:
            raise TrainingDataError(f"task {name}: {len(labels)} label(s) in its training text, 2 are needed")
        test = [example for example in test if example.label in labels]
        if not test:
            raise TrainingDataError(f"task {name}: no held-out text; bring more texts or more source files")
        return Task(
            name,
            domain,
            question,
            self._balanced(train, self.max_train),
            self._balanced(test, self.max_test),
        )

    def _balanced(self, examples: Iterable[Example], limit: int) -> tuple[Example, ...]:
        """At most ``limit`` examples, no label more than ``MAX_LABEL_RATIO`` times as often as another."""
        by_label: dict[str, list[Example]] = {}
        for example in sorted(examples, key=self._drawn("of its label")):
            by_label.setdefault(example.label, []).append(example)
        cap = int(MAX_LABEL_RATIO * min(map(len, by_label.values())))
        chosen = [example for group in by_label.values() for example in group[:cap]]
        return tuple(sorted(chosen, key=self._drawn("of the task"))[:limit])

    def _drawn(self, stage: str) -> Callable[[Example], bytes]:
        def key(example: Example) -> bytes:
            return hashlib.sha256(f"{self.seed}/{stage}/{example.label}/{example.text}".encode()).digest()

        return key


def _topic_tasks(topic: TopicText, sampler: _Sampler) -> list[Task]:
    def task(suffix: str, question: str, label: Callable[[Passage], str]) -> Task:
        sides = [
            [
                Example(passage.text, label(passage), number)
                for number, passage in enumerate(passages, start=1)
            ]
            for passages in (topic.train, topic.test)
        ]
        return sampler.task(f"{topic.name}/{suffix}", topic.name, question, examples=sides)

    return [
        task("group", "which module group does the text belong to", lambda passage: passage.group),
        task("kind", "does it document a class or a function", _class_or_function),
    ]


def _class_or_function(passage: Passage) -> str:
    return "class" if passage.kind == "class" else "function"


def folder_data(
    folder: Path, *, max_train: int = 5000, max_test: int = 1000, seed: int = 0
) -> tuple[DemoData, int]:
    """One domain and one task for each ``*.jsonl`` file of a folder, lines ``{"text", "label"}``.

    Files ``NAME.train.jsonl`` and ``NAME.test.jsonl`` keep their split; otherwise a fifth of the distinct
    texts, drawn by ``seed``, is held out. A training text that is also a test text is dropped.

    Returns:
        The data, and the number of lines that were no usable example.

    Raises:
        TrainingDataError: no such file, or too few labels or texts in one.
    """
    names = sorted({_set_name(path) for path in folder.glob("*.jsonl")})
    if not names:
        raise TrainingDataError(f"{folder}: no *.jsonl file; give a folder of JSON lines with text and label")
    sampler = _Sampler(max_train, max_test, seed)
    tasks, domains, num_bad_lines = [], [], 0
    for name in names:
        train, test, bad_lines = _read_set(folder, check_name(name, "domain"), seed)
        num_bad_lines += bad_lines
        held_out = {example.text for example in test}
        train = [example for example in train if example.text not in held_out]
        tasks.append(sampler.task(f"{name}/label", name, "the label in the file", examples=(train, test)))
        domains.append(DomainCorpus(name, "general", tuple(dict.fromkeys(text.text for text in train))))
    return DemoData(f"{folder}, a part of it held out", tuple(domains), tuple(tasks)), num_bad_lines


def _set_name(path: Path) -> str:
    return path.name.removesuffix(".jsonl").removesuffix(".train").removesuffix(".test")


def _read_set(folder: Path, name: str, seed: int) -> tuple[list[Example], list[Example], int]:
    train_path, test_path = folder / f"{name}.train.jsonl", folder / f"{name}.test.jsonl"
    if train_path.exists() and test_path.exists():
        train, bad_train = _read_examples(train_path)
        test, bad_test = _read_examples(test_path)
        return train, test, bad_train + bad_test
    examples, num_bad_lines = _read_examples(folder / f"{name}.jsonl")
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        draw = hashlib.sha256(f"{seed}/{' '.join(example.text.lower().split())}".encode()).digest()[0]
        sides[draw % TEST_SHARE_OF_FOLDER == 0].append(example)
    return *sides, num_bad_lines


def _read_examples(path: Path) -> tuple[list[Example], int]:
    report = CorpusReport()
    examples = list(stream_examples(path, report=report))
    return examples, report.num_bad_lines
