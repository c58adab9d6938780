"""Real text that every machine has: the documentation strings of installed Python packages, by topic.

The split is by source file: no two texts of one file are on different sides of it, and training text that
nearly copies a test text of any topic is dropped, so held-out figures are held out.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmi_engine.demo.docstrings import (
    Docstring,
    DocstringKind,
    default_roots,
    read_docstrings,
    source_files,
)
from hmi_engine.demo.near_duplicates import NearDuplicates
from hmi_engine.demo.topics import BACKGROUND_MODULES, TOPICS, Topic

__all__ = ["Documentation", "Passage", "TopicText", "harvest"]

MIN_WORDS = 6
CORPUS_WORDS = 80
TEST_SHARE = 0.2
MIN_GROUP_PASSAGES = 40


@dataclass(frozen=True)
class Passage:
    """The first words of one documentation string, with what the source says about it."""

    text: str
    group: str
    kind: DocstringKind
    source: str


@dataclass(frozen=True)
class TopicText:
    """One topic's labelled passages, split by source file, and its unlabelled text.

    ``corpus`` holds the training passages and what follows them in their documentation strings, in texts of
    at most ``CORPUS_WORDS`` words; nothing of it comes from a file of ``test`` or nearly copies one of its
    texts.
    """

    name: str
    train: tuple[Passage, ...]
    test: tuple[Passage, ...]
    corpus: tuple[str, ...]


@dataclass(frozen=True)
class Documentation:
    """All topics, and text of other packages that carries no label."""

    topics: tuple[TopicText, ...]
    background: tuple[str, ...]


@dataclass(frozen=True)
class _Split:
    """The documentation strings of one group, by side of the split."""

    group: str
    train: list[Docstring]
    test: list[Docstring]


def harvest(
    topics: Sequence[Topic] = TOPICS,
    *,
    background_modules: Sequence[str] = BACKGROUND_MODULES,
    background_words: int | None = None,
    roots: Sequence[Path] | None = None,
    max_words: int = 40,
    seed: int = 0,
) -> Documentation:
    """Reads the documentation of the modules that are installed; the same for the same files and ``seed``.

    Args:
        topics: what to look for. A group with fewer than ``MIN_GROUP_PASSAGES`` training passages, or without
            test passages, is left out (its modules are not installed, or one file holds them all).
        background_modules: unlabelled text for :attr:`Documentation.background`.
        background_words: stop reading these after about so many words (default: read all).
        roots: folders that hold packages; default the standard library and site-packages.
        max_words: passages are cut to so many words.
        seed: chooses which files are held out.
    """
    roots = default_roots() if roots is None else roots
    taken: set[str] = set()
    splits = {
        topic.name: [
            _split_by_file(group, dict(_read_files(modules, roots, taken)), seed)
            for group, modules in topic.groups.items()
        ]
        for topic in topics
    }
    held_out = NearDuplicates()
    tests = {
        name: [passage for part in parts for passage in _passages(part.group, part.test, max_words, held_out)]
        for name, parts in splits.items()
    }
    seen = NearDuplicates()
    for passage in (passage for passages in tests.values() for passage in passages):
        seen.add(passage.text)
    results = tuple(
        _topic_text(parts, tests[name], name=name, max_words=max_words, seen=seen, held_out=held_out)
        for name, parts in splits.items()
    )
    others = (text for _, texts in _read_files(background_modules, roots, taken) for text in texts)
    return Documentation(results, tuple(_corpus(others, max_words, held_out, background_words)))


def _read_files(
    modules: Iterable[str], roots: Sequence[Path], taken: set[str]
) -> Iterator[tuple[str, list[Docstring]]]:
    """Reads, one after the other, the documentation of files that no group has taken yet."""
    for module in modules:
        for path, source in source_files(module, roots):
            if source not in taken:
                taken.add(source)
                if docstrings := read_docstrings(path, source):
                    yield source, docstrings


def _split_by_file(group: str, files: dict[str, list[Docstring]], seed: int) -> _Split:
    """Holds out files, in an order drawn from ``seed``, until they have ``TEST_SHARE`` of the texts.

    A file that would carry the held-out side beyond one and a half times its share stays in training.
    """

    def drawn(source: str) -> bytes:
        return hashlib.sha256(f"{seed}/{source}".encode()).digest()

    wanted = TEST_SHARE * sum(map(len, files.values()))
    split = _Split(group, [], [])
    for source in sorted(files, key=drawn):
        texts = files[source]
        is_held_out = len(split.test) < wanted and len(split.test) + len(texts) <= 1.5 * wanted
        (split.test if is_held_out else split.train).extend(texts)
    return split


def _passages(
    group: str, docstrings: Iterable[Docstring], max_words: int, seen: NearDuplicates
) -> list[Passage]:
    passages = []
    for docstring in docstrings:
        words = docstring.prose.split()
        text = " ".join(words[:max_words])
        if len(words) >= MIN_WORDS and seen.admit(text):
            passages.append(Passage(text, group, docstring.kind, docstring.source))
    return passages


def _topic_text(
    parts: Sequence[_Split],
    tests: Sequence[Passage],
    *,
    name: str,
    max_words: int,
    seen: NearDuplicates,
    held_out: NearDuplicates,
) -> TopicText:
    train = [passage for part in parts for passage in _passages(part.group, part.train, max_words, seen)]
    sizes = Counter(passage.group for passage in train)
    groups = {passage.group for passage in tests if sizes[passage.group] >= MIN_GROUP_PASSAGES}
    docstrings = (docstring for part in parts for docstring in part.train)
    return TopicText(
        name,
        tuple(passage for passage in train if passage.group in groups),
        tuple(passage for passage in tests if passage.group in groups),
        tuple(_corpus(docstrings, max_words, held_out)),
    )


def _corpus(
    docstrings: Iterable[Docstring], max_words: int, held_out: NearDuplicates, limit: int | None = None
) -> Iterator[str]:
    """Each documentation string's first passage and what follows it; each text once, none near a test text.

    Ends after about ``limit`` words.
    """
    texts: set[str] = set()
    num_words = 0
    for docstring in docstrings:
        if limit is not None and num_words >= limit:
            return
        words = docstring.prose.split()
        num_words += len(words)
        for text in _cut(words, max_words):
            if text not in texts and not held_out.contains(text):
                texts.add(text)
                yield text


def _cut(words: list[str], max_words: int) -> Iterator[str]:
    starts = [0, *range(max_words, len(words), CORPUS_WORDS)]
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
        yield " ".join(words[start:end])
