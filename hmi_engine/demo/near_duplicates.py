"""Finds texts that are nearly copies of texts seen before (w-shingling, Broder 1997)."""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["NearDuplicates"]

_WORD = re.compile(r"[a-z]+")


class NearDuplicates:
    """Remembers the word shingles of texts, and tells when another text shares too many of them."""

    def __init__(self, *, shingle_words: int = 4, share: float = 0.5) -> None:
        """A text is a near-duplicate if at least ``share`` of its ``shingle_words``-word shingles are known.

        Case, digits and punctuation do not count; a text shorter than a shingle is one shingle.
        """
        self._shingle_words = shingle_words
        self._share = share
        self._known: set[tuple[str, ...]] = set()

    def contains(self, text: str) -> bool:
        """Whether ``text`` is a near-duplicate of what was added. A text without letters always is."""
        shingles = set(self._shingles(text))
        return len(shingles & self._known) >= self._share * len(shingles)

    def add(self, text: str) -> None:
        """Remembers a text."""
        self._known.update(self._shingles(text))

    def admit(self, text: str) -> bool:
        """Adds ``text`` and returns True, unless it is a near-duplicate."""
        if self.contains(text):
            return False
        self.add(text)
        return True

    def _shingles(self, text: str) -> Iterator[tuple[str, ...]]:
        words = _WORD.findall(text.lower())
        if not words:
            return
        for start in range(max(1, len(words) - self._shingle_words + 1)):
            yield tuple(words[start : start + self._shingle_words])
