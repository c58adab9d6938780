"""Texts to token ids, with the base model's own fast tokenizer."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer

from hmi_engine.errors import StoreCorruptError
from hmi_engine.models.general_folder import CONFIGURATION_FILE, GENERATION_FILE

__all__ = ["EncodedText", "TextEncoder"]


@dataclass(frozen=True)
class EncodedText:
    """Token ids of one text, special tokens included, and where its words lie.

    Attributes:
        input_ids: the token ids, at most the encoder's ``max_tokens``.
        truncated: whether the text had more tokens than that.
        words: for each word (as the tokenizer's pre-tokenizer splits) the index of its first token and its
            first and one-past-last character.
    """

    input_ids: list[int]
    truncated: bool
    words: tuple[tuple[int, int, int], ...]


class TextEncoder:
    """Encodes texts in parallel (the Rust tokenizer's own threads)."""

    def __init__(self, directory: Path, max_tokens: int) -> None:
        """Loads ``tokenizer.json`` of a store's ``general`` folder.

        Raises:
            StoreCorruptError: the file is missing or damaged.
        """
        path = directory / "tokenizer.json"
        try:
            self._tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust binding raises bare Exception
            raise StoreCorruptError(f"{path}: unreadable tokenizer: {error}") from error
        self.max_tokens = max_tokens
        self._directory = directory
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(max_tokens)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer itself, for decoding."""
        return self._tokenizer

    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens of which any ends a text, as transformers' ``generate`` takes them; empty for none.

        Raises:
            StoreCorruptError: the file that names them is damaged.
        """
        path = self._directory / GENERATION_FILE
        if not path.exists():  # a store that was made by an earlier HMI
            path = self._directory / CONFIGURATION_FILE
        try:
            found = json.loads(path.read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise StoreCorruptError(f"{path}: unreadable settings of the base model: {error}") from error
        return tuple(found) if isinstance(found, list) else () if found is None else (found,)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @functools.cached_property
    def _untruncated(self) -> Tokenizer:
        """The same tokenizer without a limit; another one, as two threads may ask for both."""
        tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
        tokenizer.no_truncation()
        return tokenizer

    def token_ids(self, texts: list[str], *, whole: bool = False) -> list[list[int]]:
        """Token ids alone; texts longer than ``max_tokens`` are cut, unless ``whole`` ones are asked for."""
        tokenizer = self._untruncated if whole else self._tokenizer
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]

    def inner_token_ids(self, texts: list[str]) -> list[list[int]]:
        """Token ids of whole texts, without the special tokens around them."""
        encodings = self._untruncated.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def definition(self) -> dict[str, Any]:
        """The tokenizer as ``tokenizer.json`` describes it."""
        described: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return described

    def encode(self, texts: list[str], *, words: bool = False) -> list[EncodedText]:
        """Encodes texts; ``words`` asks for word positions too, which token classification reports."""
        # Not to follow where each token stands in the text saves a fifth of the time.
        encode_batch = self._tokenizer.encode_batch if words else self._tokenizer.encode_batch_fast
        return [
            EncodedText(
                encoding.ids,
                truncated=len(encoding.overflowing) > 0,
                words=_word_spans(encoding) if words else (),
            )
            for encoding in encode_batch(texts)
        ]


def _word_spans(encoding: Encoding) -> tuple[tuple[int, int, int], ...]:
    spans: dict[int, tuple[int, int, int]] = {}
    for index, (word, (start, end)) in enumerate(zip(encoding.word_ids, encoding.offsets, strict=True)):
        if word is not None:
            first, begin, _ = spans.get(word, (index, start, end))
            spans[word] = (first, begin, end)
    return tuple(spans.values())
