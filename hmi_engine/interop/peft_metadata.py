"""What HMI leaves in the header of a PEFT file, for which PEFT has no place and which it ignores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop.adapter_folder import TensorFile
from hmi_engine.interop.imported_tenant import ProblemType, default_labels

__all__ = ["PeftMetadata"]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore")

    labels: tuple[str, ...] | None = None
    problem_type: ProblemType | None = None
    carriers: tuple[str, ...] = ()


@dataclass(frozen=True)
class PeftMetadata:
    """Entries of a safetensors header, each JSON.

    Attributes:
        labels: names of the classes.
        problem_type: what the classifier's numbers mean.
        carriers: modules whose LoRA is all zero, and there only because PEFT has no adapter of biases alone.
    """

    labels: tuple[str, ...] | None = None
    problem_type: ProblemType | None = None
    carriers: frozenset[str] = frozenset()

    @classmethod
    def read(cls, file: TensorFile) -> PeftMetadata:
        """Reads a file's header.

        Raises:
            InvalidAdapterError: an entry of these names holds something else.
        """
        try:
            entries = {
                name: json.loads(value)
                for name, value in file.metadata.items()
                if name in _Fields.model_fields
            }
            fields = _Fields.model_validate(entries)
        except (ValueError, TypeError, RecursionError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else error
            raise InvalidAdapterError(
                f"{file.path}: unreadable: the header's entries: {reason!s:.100}"
            ) from error
        return cls(fields.labels, fields.problem_type, frozenset(fields.carriers))

    def class_names(self, labels: Sequence[str] | None, count: int, notes: list[str]) -> tuple[str, ...]:
        """Names of a classifier's classes: those given, else the header's, else ``LABEL_0`` and a note.

        Raises:
            InvalidHeadError: not ``count`` names.
        """
        names = tuple(labels) if labels is not None else self.labels
        if names is None:
            names = default_labels(count)
            if names:
                notes.append(f"PEFT keeps no label names: the classes are called {names[0]} to {names[-1]}")
        if len(names) != count:
            raise InvalidHeadError(f"{len(names)} labels were given, the classifier has {count} classes")
        return names

    def entries(self) -> dict[str, str]:
        """The header's entries, as safetensors takes them."""
        entries: dict[str, Any] = {"labels": self.labels, "problem_type": self.problem_type}
        if self.carriers:
            entries["carriers"] = sorted(self.carriers)
        kept = {name: json.dumps(value) for name, value in entries.items() if value is not None}
        return {"format": "pt"} | kept
