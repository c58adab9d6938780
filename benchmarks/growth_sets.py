"""Public text sets of the study of growth: folders with ``train.txt`` and ``test.txt``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.growth_texts import TokenizedTexts, tokenize
from hmi_engine.errors import CorpusError
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["LabelledSet", "read_labelled_sets"]


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """A set's own training split and its test split, every text as often as it stands there."""

    name: str
    train: TokenizedTexts
    test: TokenizedTexts


def read_labelled_sets(folder: Path, encoder: TextEncoder) -> list[LabelledSet]:
    """Reads every folder below ``folder`` that has ``train.txt`` and ``test.txt``.

    The files hold JSON lines with the field ``text``, or one token a line, its tags after it, and a blank
    line after each sentence. Raises CorpusError if there is no such folder.
    """
    folders = sorted(
        path.parent for path in folder.glob("*/train.txt") if (path.parent / "test.txt").is_file()
    )
    if not folders:
        raise CorpusError(f"{folder} has no folder with train.txt and test.txt")
    return [
        LabelledSet(
            path.name, *(tokenize(_texts(path / name), encoder) for name in ("train.txt", "test.txt"))
        )
        for path in folders
    ]


def _texts(path: Path) -> Iterator[str]:
    lines = path.read_text(encoding="utf-8").split("\n")
    if lines[0].startswith("{"):
        yield from (json.loads(line)["text"] for line in lines if line)
        return
    words: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            words.append(line.split()[0])
        elif words:
            yield " ".join(words)
            words = []
