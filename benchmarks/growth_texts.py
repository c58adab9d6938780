"""Texts of the study of growth: groups by topic, each with a corpus and held-out files, as token ids."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.arguments import Arguments, read_texts
from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.atomic import atomic_write
from hmi_engine.knowledge.corpus import corpus_files, stream_texts
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["Group", "Mixture", "TokenizedTexts", "documentation_groups", "folder_groups", "tokenize"]

HELD_OUT = "held_out.txt"
_TEXTS_PER_BATCH = 4096


@dataclass(frozen=True, eq=False)
class TokenizedTexts:
    """The token ids of S texts, one after another.

    Attributes:
        input_ids: int32 [T].
        offsets: int64 [S+1]; text s owns tokens ``offsets[s]`` to ``offsets[s+1]``.
    """

    input_ids: Tensor
    offsets: Tensor

    @property
    def num_tokens(self) -> int:
        """T, the number of tokens."""
        return self.input_ids.shape[0]

    def between(self, start: int, stop: int) -> TokenizedTexts:
        """The texts whose first token is among tokens ``start`` to ``stop``, ``stop`` not included."""
        first, last = torch.searchsorted(self.offsets, torch.tensor([start, stop])).tolist()
        offsets = self.offsets[first : last + 1]
        return TokenizedTexts(
            self.input_ids[int(offsets[0]) : int(offsets[-1])], (offsets - offsets[0]).contiguous()
        )

    @classmethod
    def join(cls, parts: Iterable[TokenizedTexts]) -> TokenizedTexts:
        """The texts of all ``parts``."""
        parts = list(parts)
        lengths = torch.cat([part.offsets.diff() for part in parts])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        return cls(torch.cat([part.input_ids for part in parts]), offsets)


@dataclass(frozen=True, eq=False)
class Group:
    """Texts of one topic: a corpus in random order of its files, and the text of files that are not in it."""

    name: str
    corpus: TokenizedTexts
    held_out: TokenizedTexts


@dataclass(frozen=True, eq=False)
class Mixture:
    """Several corpora as one, of which any beginning holds each in proportion to its size."""

    corpora: tuple[TokenizedTexts, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all corpora together."""
        return sum(corpus.num_tokens for corpus in self.corpora)

    def between(self, start: int, stop: int) -> Iterator[TokenizedTexts]:
        """The texts from token ``start`` to token ``stop``; each text belongs to one such stretch."""
        total = self.num_tokens
        for corpus in self.corpora:
            yield corpus.between(start * corpus.num_tokens // total, stop * corpus.num_tokens // total)


def tokenize(texts: Iterable[str], encoder: TextEncoder) -> TokenizedTexts:
    """Tokenises texts as a store does for a table: with special tokens, cut at the encoder's limit."""
    ids = [np.empty(0, dtype=np.int32)]
    lengths = [np.zeros(1, dtype=np.int64)]
    remaining = iter(texts)
    while batch := list(islice(remaining, _TEXTS_PER_BATCH)):
        encoded = encoder.token_ids(batch)
        ids.append(np.concatenate([np.array(text, dtype=np.int32) for text in encoded]))
        lengths.append(np.array([len(text) for text in encoded], dtype=np.int64))
    offsets = np.cumsum(np.concatenate(lengths))
    return TokenizedTexts(torch.from_numpy(np.concatenate(ids)), torch.from_numpy(offsets))


def documentation_groups(arguments: Arguments, encoder: TextEncoder, *, max_words: int) -> list[Group]:
    """The topics of the installed documentation; held out are the test texts of their tasks."""
    data = read_texts(arguments, max_words=max_words)
    groups = []
    for domain in data.domains:
        held_out = [
            example.text for task in data.tasks if task.domain == domain.name for example in task.test
        ]
        if held_out:
            corpus, test = (tokenize(texts, encoder) for texts in (domain.texts, dict.fromkeys(held_out)))
            groups.append(Group(domain.name, corpus, test))
    return groups


def folder_groups(
    folders: Iterable[Path], encoder: TextEncoder, *, cache: Path | None, max_texts: int | None
) -> list[Group]:
    """Reads folders of text files, of which ``held_out.txt`` is kept apart.

    ``cache`` is a folder that keeps token ids for the next run. ``max_texts`` limits corpus and held-out text
    of each folder. Raises CorpusError for a folder without text there, or without text elsewhere.
    """
    return [_folder_group(folder, encoder, cache, max_texts) for folder in folders]


def _folder_group(folder: Path, encoder: TextEncoder, cache: Path | None, max_texts: int | None) -> Group:
    held_out = folder / HELD_OUT
    corpus = [path for path in corpus_files(folder) if path.name != HELD_OUT]
    if not (corpus and held_out.is_file()):
        raise CorpusError(f"{folder} needs text files, and {HELD_OUT} with text of none of them")
    read = partial(_tokenized_files, encoder=encoder, cache=cache, max_texts=max_texts)
    group = Group(folder.name, read(corpus), read([held_out]))
    if not (group.corpus.num_tokens and group.held_out.num_tokens):
        raise CorpusError(f"{folder}: its corpus or its {HELD_OUT} holds no text")
    return group


def _tokenized_files(
    paths: list[Path], *, encoder: TextEncoder, cache: Path | None, max_texts: int | None
) -> TokenizedTexts:
    if cache is None:
        return tokenize(islice(stream_texts(paths), max_texts), encoder)
    stem = f"{paths[0].parent.name}-{_digest(paths, encoder, max_texts)}"
    ids, offsets = cache / f"{stem}.ids.npy", cache / f"{stem}.offsets.npy"
    if not (ids.is_file() and offsets.is_file()):
        cache.mkdir(parents=True, exist_ok=True)
        texts = tokenize(islice(stream_texts(paths), max_texts), encoder)
        atomic_write(ids, _saver(texts.input_ids))
        atomic_write(offsets, _saver(texts.offsets))
    return TokenizedTexts(*(torch.from_numpy(np.load(path, allow_pickle=False)) for path in (ids, offsets)))


def _digest(paths: list[Path], encoder: TextEncoder, max_texts: int | None) -> str:
    """Tells files (by name, size and time), limits and vocabularies apart."""
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    identity = (stats, encoder.vocab_size, encoder.max_tokens, max_texts)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def _saver(values: Tensor) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        with path.open("wb") as file:
            array: np.ndarray[Any, Any] = values.numpy()
            np.save(file, array, allow_pickle=False)

    return save
