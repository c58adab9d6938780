"""Which files a corpus is made of, and in which format each is: told from the name."""

from pathlib import Path
from typing import Literal, NamedTuple

from hmi_engine.errors import CorpusError

__all__ = [
    "EXAMPLE_FORMATS",
    "STDIN",
    "SUFFIXES",
    "ExampleFormat",
    "FileFormat",
    "TextFormat",
    "compression_of",
    "corpus_files",
    "example_format",
    "file_format",
]

TextFormat = Literal["txt", "jsonl"]
"""One text a line, or one JSON object a line."""

ExampleFormat = Literal["jsonl", "csv", "tsv", "conll"]
"""One JSON object a line, a table with a header, or a word and its tag a line."""

EXAMPLE_FORMATS: tuple[ExampleFormat, ...] = ("jsonl", "csv", "tsv", "conll")

STDIN = Path("-")
"""The path that stands for standard input; a file of this name is given by its absolute path."""


class FileFormat(NamedTuple):
    """What a file holds, and how it is compressed ('' for not at all, or by Parquet itself)."""

    kind: Literal["txt", "jsonl", "parquet"]
    compression: Literal["", "gz", "zst"]


_FORMATS = {
    ".txt": FileFormat("txt", ""),
    ".jsonl": FileFormat("jsonl", ""),
    ".parquet": FileFormat("parquet", ""),
    ".txt.gz": FileFormat("txt", "gz"),
    ".jsonl.gz": FileFormat("jsonl", "gz"),
    ".txt.zst": FileFormat("txt", "zst"),
    ".jsonl.zst": FileFormat("jsonl", "zst"),
}

SUFFIXES = tuple(_FORMATS)
"""The ends of file names that tell a format."""


def file_format(path: Path) -> FileFormat:
    """Return the format that a file's name tells; raises :class:`CorpusError` where it tells none."""
    name = path.name.lower()
    for suffix, found in _FORMATS.items():
        if name.endswith(suffix):
            return found
    raise CorpusError(f"{path}: the format is told from the name, which must end in {', '.join(SUFFIXES)}")


def example_format(path: Path) -> ExampleFormat:
    """Return the format of examples that a file's name tells, however the file is compressed.

    Raises :class:`CorpusError` where it tells none.
    """
    name = path.name.lower().removesuffix(".gz").removesuffix(".zst")
    for found in EXAMPLE_FORMATS:
        if name.endswith(f".{found}"):
            return found
    raise CorpusError(
        f"{path}: examples are read from .jsonl, .csv, .tsv and .conll files, maybe with .gz or .zst behind; "
        "the format of a file of another name must be given"
    )


def compression_of(path: Path) -> Literal["", "gz", "zst"]:
    """Return how a file's name says that it is compressed."""
    name = path.name.lower()
    if name.endswith(".gz"):
        return "gz"
    return "zst" if name.endswith(".zst") else ""


def corpus_files(path: Path) -> list[Path]:
    """Return the files that a path stands for: itself, or, sorted, those below a folder with a known suffix.

    Hidden files and folders are left out. Raises :class:`CorpusError` where there is none.
    """
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.name.lower().endswith(SUFFIXES)
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not files:
            raise CorpusError(f"folder {path} holds no {', '.join(SUFFIXES)} file")
        return files
    if not path.exists():
        raise CorpusError(f"{path} does not exist")
    file_format(path)
    return [path]
