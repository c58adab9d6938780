"""Text for a small GPT-2: documentation strings of all installed packages, split by source file.

The demo's harvest (:mod:`hmi_engine.demo.documentation`) takes certain topics; a language model takes all
that there is. As there, no two texts of one file are on different sides of the split, and training text that
nearly copies a held-out text is dropped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from hmi_engine.demo.docstrings import default_roots, read_docstrings, source_files
from hmi_engine.demo.documentation import MIN_WORDS
from hmi_engine.demo.near_duplicates import NearDuplicates
from hmi_engine.knowledge.atomic import atomic_write

__all__ = [
    "END",
    "Document",
    "SplitText",
    "data_documents",
    "installed_documents",
    "pack",
    "read_documents",
    "split_text",
    "write_documents",
]

END = "<|endoftext|>"
"""Stands before every document, as in GPT-2's own training text."""

HELD_OUT_SHARE = 0.05
_ROOT_FOLDERS = {"site-packages", "dist-packages", "test", "idlelib", "lib2to3"}


@dataclass(frozen=True)
class Document:
    """A text and the file that it is from."""

    text: str
    source: str


@dataclass(frozen=True)
class SplitText:
    """Documents to learn from, and those that the model never sees."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


def installed_documents(
    modules: Sequence[str] | None = None, roots: Sequence[Path] | None = None
) -> Iterator[Document]:
    """Every documentation string of ``modules`` (default: all of the standard library and site-packages)."""
    roots = default_roots() if roots is None else roots
    chosen = sorted(set(_module_names(roots))) if modules is None else modules
    for module in chosen:
        for path, source in source_files(module, roots):
            for docstring in read_docstrings(path, source):
                yield Document(docstring.prose, source)


def _module_names(roots: Iterable[Path]) -> Iterator[str]:
    for root in roots:
        for path in root.iterdir():
            if path.is_dir() and path.name.isidentifier() and path.name not in _ROOT_FOLDERS:
                yield path.name
            elif path.suffix == ".py":
                yield path.stem


def data_documents(folder: Path) -> tuple[list[Document], list[Document]]:
    """The ``text`` fields of all JSON lines below a folder: (train, held out), the latter of test files.

    Lines of other formats are passed over.
    """
    sides: tuple[list[Document], list[Document]] = ([], [])
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix in (".txt", ".jsonl", ".json"))
    for path in paths:
        is_test = "test" in path.name.split(".")
        source = path.relative_to(folder).as_posix()
        for line in path.read_text().splitlines():
            if text := _text_field(line):
                sides[is_test].append(Document(" ".join(text.split()), source))
    return sides


def _text_field(line: str) -> str:
    try:
        parsed = json.loads(line) if line.startswith("{") else {}
    except ValueError:
        return ""
    text = parsed.get("text")
    return text if isinstance(text, str) else ""


def split_text(
    documents: Iterable[Document],
    *,
    seed: int,
    more: tuple[Iterable[Document], Iterable[Document]] = ((), ()),
) -> SplitText:
    """Holds out files drawn by ``seed``; keeps each text once, and none that nearly copies another.

    Args:
        documents: to be split.
        seed: chooses the files.
        more: further documents for (train, held out).
    """
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in documents:
        sides[_is_held_out(document.source, seed)].append(document)
    seen = NearDuplicates()
    held_out = tuple(_distinct([*sides[True], *more[1]], seen))
    return SplitText(tuple(_distinct([*sides[False], *more[0]], seen)), held_out)


def _is_held_out(source: str, seed: int) -> bool:
    drawn = hashlib.sha256(f"{seed}/{source}".encode()).digest()[:4]
    return int.from_bytes(drawn, "big") < HELD_OUT_SHARE * 2**32


def _distinct(documents: Iterable[Document], seen: NearDuplicates) -> Iterator[Document]:
    for document in documents:
        if document.text.count(" ") + 1 >= MIN_WORDS and seen.admit(document.text):
            yield document


def write_documents(path: Path, documents: Iterable[Document]) -> None:
    """Writes JSON lines ``{"text", "source"}``, atomically."""
    lines = [json.dumps({"text": each.text, "source": each.source}) + "\n" for each in documents]
    atomic_write(path, lambda partial: _write_text(partial, "".join(lines)))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def read_documents(path: Path) -> list[Document]:
    """Reads what :func:`write_documents` wrote."""
    with path.open() as file:
        return [Document(**json.loads(line)) for line in file]


def pack(documents: Iterable[Document], tokenizer: Tokenizer, positions: int) -> Tensor:
    """All documents one after the other, each behind :data:`END`, in sequences: int64 [S, positions].

    What is left at the end and fills no sequence is dropped.
    """
    encodings = tokenizer.encode_batch_fast([END + document.text for document in documents])
    tokens = torch.tensor([token for encoding in encodings for token in encoding.ids], dtype=torch.int64)
    num_sequences = len(tokens) // positions
    return tokens[: num_sequences * positions].view(num_sequences, positions)
