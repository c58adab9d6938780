"""Examples of every task, streamed from files of JSON lines, tables, and columns of words and tags."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any, cast

from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.corpus_files import ExampleFormat, example_format
from hmi_engine.knowledge.corpus_json import json_objects, text_fault
from hmi_engine.knowledge.corpus_report import BadLine, CorpusReport, Reading
from hmi_engine.knowledge.corpus_tables import table_rows, tagged_sentences
from hmi_engine.knowledge.examples import (
    AnyExample,
    Example,
    MultiLabelExample,
    PairExample,
    RegressionExample,
    ScoredPairExample,
    TaggedExample,
    Task,
)

__all__ = ["LABEL_SEPARATOR", "finite_number", "stream_examples", "stream_task_examples"]

LABEL_SEPARATOR = ";"
"""Between the labels of one text in a table."""
_REPLACED = "\ufffd"
"""What stands for bytes that are no UTF-8."""


def stream_examples(
    path: str | Path,
    text_field: str = "text",
    label_field: str = "label",
    *,
    file_format: ExampleFormat | None = None,
    on_bad_line: Callable[[BadLine], None] | None = None,
    report: CorpusReport | None = None,
) -> Iterator[Example]:
    """Yield the labelled texts of a file: :func:`stream_task_examples` for classification."""
    examples = stream_task_examples(
        path,
        "classification",
        text_field=text_field,
        label_field=label_field,
        file_format=file_format,
        on_bad_line=on_bad_line,
        report=report,
    )
    return cast(Iterator[Example], examples)


def stream_task_examples(
    path: str | Path,
    task: Task,
    *,
    text_field: str = "text",
    label_field: str = "label",
    file_format: ExampleFormat | None = None,
    on_bad_line: Callable[[BadLine], None] | None = None,
    report: CorpusReport | None = None,
) -> Iterator[AnyExample]:
    """Yield the examples of a file, one in memory at a time.

    JSON lines and tables with a header (.csv, .tsv; all may be .gz or .zst) have these fields:

    - classification: a text, and a label: a string, or an integer or boolean, of which the decimal digits or
      ``true`` and ``false`` are taken, but not now one and now the other.
    - multi_label: a text, and as label a list of strings; in a table one value with ``;`` between labels.
    - regression: a text, and as label a finite number.
    - token_classification: in JSON lists ``words`` and ``tags`` of equal lengths; or a .conll file, whose
      lines have a word and, in the last column, its tag, with a blank line behind each sentence.
    - embedding: ``anchor``, ``positive`` and maybe ``negative``; or ``first``, ``second`` and a ``score``.

    A line without them goes to ``report`` and ``on_bad_line``, and the others go on.

    Args:
        path: the file.
        task: what the examples are for.
        text_field: name of the field, or the column, of the text.
        label_field: name of that of the label.
        file_format: the format, where the file's name does not tell it.
        on_bad_line: told about each line that is left out.
        report: counts what is read.

    Raises:
        CorpusError: a file that is missing, unreadable or of another format, labels of several types, or a
            table whose quoting or columns are wrong.
    """
    path = Path(path)
    reading = Reading(CorpusReport() if report is None else report, on_bad_line)
    chosen = example_format(path) if file_format is None else file_format
    if chosen == "conll":
        if task != "token_classification":
            raise CorpusError(f"{path}: columns of words and tags are for token_classification, not {task}")
        for begin, words, tags in tagged_sentences(path, reading):
            yield TaggedExample(_accept_all(words, reading), tuple(tags), begin)
        return
    rows = json_objects(path, reading) if chosen == "jsonl" else table_rows(path, chosen, reading)
    parser = _Parser(path, task, text_field, label_field, is_table=chosen != "jsonl")
    for number, found in rows:
        try:
            yield parser.example(number, found, reading)
        except _NoExampleError as fault:
            reading.refuse(path, number, str(fault))


class _NoExampleError(ValueError):
    """Why a line holds no example."""


@dataclass
class _Parser:
    """Makes examples of one file's rows, and sees to it that labels are of one type."""

    path: Path
    task: Task
    text_field: str
    label_field: str
    is_table: bool
    first_label: tuple[int, type] | None = field(default=None)

    def example(self, number: int, found: dict[str, Any], reading: Reading) -> AnyExample:
        """Raises :class:`_NoExampleError` where there is none."""
        if self.task == "token_classification":
            words, tags = self._strings(found, "words"), self._strings(found, "tags")
            if len(words) != len(tags):
                raise _NoExampleError(f"{len(words)} words and {len(tags)} tags; each word has one tag")
            checked = tuple(self._checked_label(tag, number) for tag in tags)
            return TaggedExample(_accept_all(words, reading), checked, number)
        if self.task == "embedding":
            return self._pair(number, found, reading)
        text = self._text(found, self.text_field)
        if self.task == "classification":
            label = self._label(number, found)
            return Example(reading.accept(text), label, number)
        if self.task == "multi_label":
            labels = tuple(self._checked_label(label, number) for label in self._labels(found))
            return MultiLabelExample(reading.accept(text), labels, number)
        value = self._number(found, self.label_field)
        return RegressionExample(reading.accept(text), value, number)

    def _pair(self, number: int, found: dict[str, Any], reading: Reading) -> AnyExample:
        if "score" in found:
            first, second = (self._text(found, name) for name in ("first", "second"))
            score = self._number(found, "score")
            return ScoredPairExample(reading.accept(first), reading.accept(second), score, number)
        anchor, positive = (self._text(found, name) for name in ("anchor", "positive"))
        has_negative = found.get("negative") not in (None, "")
        negative = reading.accept(self._text(found, "negative")) if has_negative else None
        return PairExample(reading.accept(anchor), reading.accept(positive), negative, number)

    def _text(self, found: dict[str, Any], name: str) -> str:
        if fault := text_fault(found, name):
            raise _NoExampleError(fault)
        text: str = found[name]
        return text

    def _label(self, number: int, found: dict[str, Any]) -> str:
        label = found.get(self.label_field)
        if not isinstance(label, str | int) or (isinstance(label, str) and not label.strip()):
            raise _NoExampleError(f"no label in field {self.label_field!r}: {label!r:.80}")
        if self.first_label is None:
            self.first_label = (number, type(label))
        line, expected = self.first_label
        if type(label) is not expected:
            raise CorpusError(
                f"{self.path}:{number}: label {label!r:.80} is of type {type(label).__name__}, but that of "
                f"line {line} is of type {expected.__name__}; write all labels alike"
            )
        return self._checked_label(label, number) if isinstance(label, str) else json.dumps(label)

    def _checked_label(self, label: str, number: int) -> str:
        """A text may hold a character that could not be read; an answer's label would be another one."""
        if _REPLACED in label:
            raise CorpusError(
                f"{self.path}:{number}: label {label!r:.80} holds bytes that are no UTF-8; save the file "
                "as UTF-8"
            )
        return label

    def _labels(self, found: dict[str, Any]) -> tuple[str, ...]:
        if not self.is_table:
            return tuple(self._strings(found, self.label_field))
        if not isinstance(value := found.get(self.label_field), str):
            raise _NoExampleError(f"no column {self.label_field!r}; the columns are {sorted(found)!r:.200}")
        return tuple(label.strip() for label in value.split(LABEL_SEPARATOR) if label.strip())

    def _strings(self, found: dict[str, Any], name: str) -> list[str]:
        values = found.get(name)
        if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
            raise _NoExampleError(f"no list of strings that are not blank in field {name!r}: {values!r:.80}")
        return values

    def _number(self, found: dict[str, Any], name: str) -> float:
        value = found.get(name)
        if self.is_table and isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                raise _NoExampleError(f"no number in column {name!r}: {value!r:.80}") from None
        if (number := finite_number(value)) is None:
            raise _NoExampleError(f"no finite number in field {name!r}: {value!r:.80}")
        return number


def finite_number(value: object) -> float | None:
    """Return a number as float64; None for what is no number, is not finite, or has no place in float64."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the largest float
        return None
    return number if math.isfinite(number) else None


def _accept_all(words: list[str], reading: Reading) -> tuple[str, ...]:
    """The words of a text, which is counted as one."""
    accepted = tuple(reading.accept("\n".join(words)).split("\n"))
    if len(accepted) != len(words):
        raise _NoExampleError("a word holds the end of a line")
    return accepted
