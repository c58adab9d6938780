"""Files that trainings read: examples, and texts for a teacher to label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hmi_engine.cli.output import checked_choice, warn_of_reading
from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.corpus import stream_texts
from hmi_engine.knowledge.corpus_examples import stream_task_examples
from hmi_engine.knowledge.corpus_files import EXAMPLE_FORMATS, ExampleFormat
from hmi_engine.knowledge.corpus_report import CorpusReport
from hmi_engine.knowledge.examples import AnyExample, Task

__all__ = ["TrainingFiles"]


class TrainingFiles:
    """How the files of one tenant are read; warnings of lines that are left out begin with ``whose``.

    Raises:
        typer.BadParameter: ``file_format`` is none of examples.
    """

    def __init__(
        self,
        task: Task,
        *,
        file_format: str | None = None,
        text_field: str = "text",
        label_field: str = "label",
        whose: str = "",
    ) -> None:
        self._task, self._text_field, self._label_field = task, text_field, label_field
        self._format: ExampleFormat | None = None
        if file_format is not None:
            self._format = checked_choice(file_format, EXAMPLE_FORMATS, "--format")
        self._whose = whose

    def examples(self, path: Path | None) -> list[AnyExample]:
        """The examples of a file, none without one; raises :class:`CorpusError` where a file holds none."""
        if path is None:
            return []
        report = CorpusReport()
        examples = list(
            stream_task_examples(
                path,
                self._task,
                text_field=self._text_field,
                label_field=self._label_field,
                file_format=self._format,
                report=report,
            )
        )
        warn_of_reading(report, self._whose)
        if not examples:
            raise CorpusError(
                f"{path} holds no {self._task} example; are the task, the format and the fields "
                f"{self._text_field!r} and {self._label_field!r} right?"
            )
        return examples

    def unlabelled(self, paths: Sequence[Path]) -> list[str]:
        """The texts of files, none without files; raises :class:`CorpusError` where all hold none."""
        report = CorpusReport()
        texts = list(stream_texts(paths, text_field=self._text_field, report=report))
        warn_of_reading(report, self._whose)
        if paths and not texts:
            raise CorpusError(
                f"{', '.join(map(str, paths)):.200} holds no unlabelled text; is the field "
                f"{self._text_field!r} right?"
            )
        return texts
