"""What tenants are trained and judged on: one type of example for each task."""

from typing import Literal, NamedTuple, TypeAlias

__all__ = [
    "TASKS",
    "AnyExample",
    "Example",
    "MultiLabelExample",
    "PairExample",
    "RegressionExample",
    "ScoredPairExample",
    "TaggedExample",
    "Task",
]

Task = Literal["classification", "multi_label", "token_classification", "embedding", "regression"]

TASKS: tuple[Task, ...] = (
    "classification",
    "multi_label",
    "token_classification",
    "embedding",
    "regression",
)


class Example(NamedTuple):
    """A labelled text and its line number in the file."""

    text: str
    label: str
    line: int = 0


class MultiLabelExample(NamedTuple):
    """A text, all labels that apply to it (maybe none), and its line number in the file."""

    text: str
    labels: tuple[str, ...]
    line: int = 0


class TaggedExample(NamedTuple):
    """The words of a sentence, a tag for each (such as ``B-Disease``), and the line where they begin."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    line: int = 0


class RegressionExample(NamedTuple):
    """A text, the number that is to be predicted from it, and its line number in the file."""

    text: str
    value: float
    line: int = 0


class PairExample(NamedTuple):
    """Two texts whose embeddings shall be near, and maybe one that shall be far from ``anchor``."""

    anchor: str
    positive: str
    negative: str | None = None
    line: int = 0


class ScoredPairExample(NamedTuple):
    """Two texts and how alike people find them, on any scale; the more alike, the larger."""

    first: str
    second: str
    score: float
    line: int = 0


AnyExample: TypeAlias = (
    Example | MultiLabelExample | TaggedExample | RegressionExample | PairExample | ScoredPairExample
)
