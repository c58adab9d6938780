"""Token ids of many texts at once: each word is tokenised once and remembered, where the tokenizer allows it.

Text repeats its words (Zipf's law), and a BERT tokenizer treats what stands between two spaces for itself. So
the fast tokenizer only sees words that are new, and the others are a look-up: the same ids in a fraction of
the time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from hmi_engine.models.tokenization import TextEncoder

__all__ = ["PackedTokens", "TokenizeTexts", "WordMemory", "corpus_tokenizer", "treats_words_alone"]

PackedTokens: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
"""Ids int32 [T] of all texts end to end, and offsets int64 [texts + 1]."""

TokenizeTexts: TypeAlias = Callable[[list[str]], PackedTokens]

MAX_WORDS = 1 << 19
MAX_CHARACTERS = 1 << 24
"""Beyond one of these the memory, of about 100 MiB, is emptied. The frequent words are back soon."""

_NORMALIZERS = ("BertNormalizer", "Lowercase", "NFC", "NFD", "StripAccents")
_PRE_TOKENIZERS = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit")
_MODELS = ("WordPiece", "WordLevel")


def corpus_tokenizer(encoder: TextEncoder) -> TokenizeTexts:
    """The fastest way to the ids of whole texts, as ``encoder.token_ids(texts, whole=True)`` gives them.

    Nothing is cut at the model's positions: windows behind them are as good as those before.
    """
    if not treats_words_alone(encoder.definition()):
        return lambda texts: _pack(encoder.token_ids(texts, whole=True))
    return WordMemory(encoder).tokenize


def treats_words_alone(definition: dict[str, Any]) -> bool:
    """Whether the ids of a text are those of what stands between its spaces, laid end to end.

    Asked of a ``tokenizer.json``. A no is always safe. All normalizers that are taken for a yes work on
    single characters, or on a character and the marks that follow it, and a space is none of them.
    """
    normalizer = definition.get("normalizer") or {"type": "Sequence", "normalizers": []}
    normalizers = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    return (
        all(part["type"] in _NORMALIZERS for part in normalizers)
        and (definition.get("pre_tokenizer") or {}).get("type") in _PRE_TOKENIZERS
        and definition["model"].get("type") in _MODELS
        and all(_is_found_inside_words(token) for token in definition.get("added_tokens", []))
    )


def _is_found_inside_words(token: dict[str, Any]) -> bool:
    takes_neighbours = token["lstrip"] or token["rstrip"] or token["single_word"]
    return not takes_neighbours and token["content"].isascii() and not any(map(str.isspace, token["content"]))


class WordMemory:
    """Tokenises texts word by word, and each word once.

    For encoders of which :func:`treats_words_alone`. Not to be used from two threads at once.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        """Finds out which tokens the encoder puts before and behind every text."""
        self._encoder = encoder
        self._prefix, self._suffix = _special_tokens(encoder)
        self._forget()

    def _forget(self) -> None:
        self._places = _Places()
        self._characters = 0
        self._ids = array("i")
        self._ends = array("q", [0])

    def tokenize(self, texts: list[str]) -> PackedTokens:
        """The ids of the whole ``texts``, special tokens around each included."""
        if len(self._places) > MAX_WORDS or self._characters > MAX_CHARACTERS:
            self._forget()
        words = [text.split(" ") for text in texts]
        num_words = np.fromiter(map(len, words), np.int64, len(words))
        places = np.fromiter(
            map(self._places.__getitem__, chain.from_iterable(words)), np.int64, num_words.sum()
        )
        self._learn()
        return self._surround(*self._gather(places, num_words))

    def _learn(self) -> None:
        """Tokenises the words that the last texts added."""
        new = self._places.take_new()
        for ids in self._encoder.inner_token_ids(new):
            self._ids.extend(ids)
            self._ends.append(len(self._ids))
        self._characters += sum(map(len, new))

    def _gather(
        self, places: npt.NDArray[np.int64], num_words: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """The ids of the words at ``places``, and how many each text has; a text has at least one word."""
        ends = np.frombuffer(self._ends, np.int64)
        starts, lengths = ends[places], ends[places + 1] - ends[places]
        ids = np.frombuffer(self._ids, np.int32)[_ranges(starts, lengths)] if self._ids else _NO_IDS
        return ids, np.add.reduceat(lengths, np.cumsum(num_words) - num_words)

    def _surround(self, inner: npt.NDArray[np.int32], num_inner: npt.NDArray[np.int64]) -> PackedTokens:
        """Puts the special tokens around each text."""
        num_prefix, num_suffix = len(self._prefix), len(self._suffix)
        offsets = np.zeros(len(num_inner) + 1, np.int64)
        np.cumsum(num_inner + num_prefix + num_suffix, out=offsets[1:])
        ids = np.empty(offsets[-1], np.int32)
        ids[offsets[:-1, None] + np.arange(num_prefix)] = self._prefix
        ids[offsets[1:, None] - np.arange(num_suffix, 0, -1)] = self._suffix
        ids[_ranges(offsets[:-1] + num_prefix, num_inner)] = inner
        return ids, offsets


_NO_IDS = np.empty(0, np.int32)


class _Places(dict[str, int]):
    """Numbers words in the order of their first appearance."""

    def __init__(self) -> None:
        self._new: list[str] = []

    def __missing__(self, word: str) -> int:
        place = self[word] = len(self)
        self._new.append(word)
        return place

    def take_new(self) -> list[str]:
        """The words since the last call."""
        new, self._new = self._new, []
        return new


def _ranges(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The numbers from each start on, as many as its length, end to end."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def _special_tokens(encoder: TextEncoder) -> tuple[list[int], list[int]]:
    """What the encoder puts before and behind a text."""
    [whole], [inner] = encoder.token_ids(["a"]), encoder.inner_token_ids(["a"])
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    return whole[:start], whole[start + len(inner) :]


def _pack(sequences: Sequence[list[int]]) -> PackedTokens:
    offsets = np.zeros(len(sequences) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, sequences), np.int64, len(sequences)), out=offsets[1:])
    return np.fromiter(chain.from_iterable(sequences), np.int32, offsets[-1]), offsets
