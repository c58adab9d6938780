"""Tokenising word by word gives the ids of the fast tokenizer on the whole text."""

from __future__ import annotations

import json
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from hmi_engine.construct import counting_tokens
from hmi_engine.construct.counting_tokens import (
    PackedTokens,
    WordMemory,
    corpus_tokenizer,
    treats_words_alone,
)
from hmi_engine.models.tokenization import TextEncoder

WORDS = [
    *(
        "the",
        "cell",
        "Ünïcode",
        "don't",
        "naïve",
        "x86_64",
        "[MASK]",
        "a[SEP]b",
        "[mask]",
        "中文字",
        "ΣΑΣ",
        "İ",
    ),
    *("", "\t", "\u00a0", "\u200b", "\x1c", "\u0301", "e\u0301\u0323", "\ufeff", "\u3000", "\u1100\u1161"),
    *("#!/bin/sh", "supercalifragilisticexpialidocious", "a" * 120, "\U0001f600", "\x00", "\u2028"),
]
TEXT = st.lists(st.sampled_from(WORDS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6))
TEXTS = st.lists(TEXT.map(" ".join) | st.text(st.characters(exclude_categories=["Cs"])), max_size=5)


@pytest.fixture(scope="module", params=[12, 48])
def memory(request: pytest.FixtureRequest, tiny_bert: Path) -> WordMemory:
    return WordMemory(TextEncoder(tiny_bert, request.param))


@pytest.fixture(scope="module")
def real_memory(minilm: Path) -> WordMemory:
    return WordMemory(TextEncoder(minilm, 32))


def whole_ids(encoder: TextEncoder, texts: list[str]) -> list[list[int]]:
    """By the fast tokenizer itself, without a limit."""
    tokenizer = Tokenizer.from_str(encoder._tokenizer.to_str())
    tokenizer.no_truncation()
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def sequences(packed: PackedTokens) -> list[list[int]]:
    ids, offsets = packed
    assert offsets[0] == 0 and offsets[-1] == len(ids)
    return [ids[begin:end].tolist() for begin, end in pairwise(offsets)]


@settings(deadline=None, max_examples=60)
@given(texts=TEXTS)
def test_words_alone_give_the_ids_of_the_text(memory: WordMemory, texts: list[str]) -> None:
    assert sequences(memory.tokenize(texts)) == whole_ids(memory._encoder, texts)


@settings(deadline=None, max_examples=150)
@given(texts=TEXTS)
def test_words_alone_give_the_ids_of_a_real_tokenizer(real_memory: WordMemory, texts: list[str]) -> None:
    assert sequences(real_memory.tokenize(texts)) == whole_ids(real_memory._encoder, texts)


def test_a_full_memory_starts_anew(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, corpus: list[str]
) -> None:
    encoder = TextEncoder(tiny_bert, 48)
    expected = whole_ids(encoder, corpus)
    for name in ("MAX_WORDS", "MAX_CHARACTERS"):
        with monkeypatch.context() as patch:
            patch.setattr(counting_tokens, name, 20)
            memory = WordMemory(encoder)
            found = [sequences(memory.tokenize(corpus[i : i + 5])) for i in range(0, len(corpus), 5)]
            assert list(chain.from_iterable(found)) == expected


def test_a_tokenizer_without_special_tokens(tiny_bert: Path) -> None:
    encoder = TextEncoder(tiny_bert, 4)
    encoder._tokenizer.post_processor = None
    texts = ["", "the cell binds a gene", " ", "the"]
    assert sequences(WordMemory(encoder).tokenize(texts)) == whole_ids(encoder, texts)


def changed(**changes: Any) -> dict[str, Any]:
    token = AddedToken("[X]", **changes.pop("token", {}))
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens([token])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    definition: dict[str, Any] = json.loads(tokenizer.to_str())
    return definition


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])}, True),
        ({"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.Strip()])}, False),
        ({"normalizer": normalizers.Replace(" ", "_")}, False),
        ({"pre_tokenizer": pre_tokenizers.WhitespaceSplit()}, True),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel()}, False),
        ({"pre_tokenizer": pre_tokenizers.Metaspace()}, False),
        ({"model": models.BPE()}, False),
        ({"token": {"lstrip": True}}, False),
        ({"token": {"rstrip": True}}, False),
        ({"token": {"single_word": True}}, False),
    ],
)
def test_only_tokenizers_that_split_at_spaces_are_trusted(changes: dict[str, Any], expected: bool) -> None:
    assert treats_words_alone(changed(**changes)) is expected


def test_other_tokenizers_see_the_whole_text(tiny_bert: Path, corpus: list[str]) -> None:
    encoder = TextEncoder(tiny_bert, 48)
    encoder._tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    assert sequences(corpus_tokenizer(encoder)(corpus)) == whole_ids(encoder, corpus)
