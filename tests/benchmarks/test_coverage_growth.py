"""Shares of held-out n-grams are those of collections.Counter, and every text is counted once."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.coverage_growth import main
from benchmarks.growth_counts import Counts, Ranking, Wanted, chain_shares, grow, table_shares
from benchmarks.growth_sets import read_labelled_sets
from benchmarks.growth_texts import Mixture, TokenizedTexts, folder_groups, tokenize
from benchmarks.result import BenchmarkResult
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.selection import bytes_per_row, table_bytes
from hmi_engine.models.packing import PackedSequences
from hmi_engine.models.tokenization import TextEncoder

Texts = list[list[int]]
Gram = tuple[int, ...]
texts_of_tokens = st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), min_size=1, max_size=12)


def pack(texts: Texts) -> TokenizedTexts:
    packed = PackedSequences.pack(texts)
    return TokenizedTexts(packed.input_ids, packed.offsets)


def unpack(texts: TokenizedTexts) -> Texts:
    pieces = texts.input_ids.split(texts.offsets.diff().tolist())
    return [piece.tolist() for piece in pieces]


def grams(texts: Texts, order: int) -> Counter[Gram]:
    return Counter(
        tuple(text[start : start + order]) for text in texts for start in range(len(text) - order + 1)
    )


def share(wanted: Counter[Gram], found: set[Gram]) -> float:
    return sum(count for gram, count in wanted.items() if gram in found) / wanted.total()


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(packaged_model(), 64)


@given(st.lists(texts_of_tokens, min_size=1, max_size=3), st.lists(st.integers(0, 300), max_size=4))
def test_stretches_of_a_mixture_hold_each_text_once_and_in_order(
    corpora: list[Texts], cuts: list[int]
) -> None:
    mixture = Mixture(tuple(map(pack, corpora)))
    limits = [0, *sorted(min(cut, mixture.num_tokens) for cut in cuts), mixture.num_tokens]
    found: list[Texts] = [[] for _ in corpora]
    for start, stop in pairwise(limits):
        for texts, part in zip(found, mixture.between(start, stop), strict=True):
            texts.extend(unpack(part))
    assert found == corpora


@given(texts_of_tokens)
def test_half_a_mixture_is_half_of_each_corpus_but_for_one_text(texts: Texts) -> None:
    corpus, twice = pack(texts), pack(texts * 2)
    mixture = Mixture((corpus, twice))
    for part, whole in zip(mixture.between(0, mixture.num_tokens // 2), (corpus, twice), strict=True):
        assert abs(part.num_tokens - whole.num_tokens / 2) <= max(map(len, texts))


@given(texts_of_tokens, texts_of_tokens)
def test_joined_texts_are_those_of_both(first: Texts, second: Texts) -> None:
    assert unpack(TokenizedTexts.join(map(pack, (first, second)))) == first + second


@pytest.mark.parametrize("order", [1, 2, 3])
@settings(max_examples=40)
@given(corpus=texts_of_tokens, held_out=texts_of_tokens, training=texts_of_tokens, size=st.integers(0, 40))
def test_growth_counts_like_counter(
    order: int, corpus: Texts, held_out: Texts, training: Texts, size: int
) -> None:
    wanted = grams([[*text, 0, 0] for text in held_out], order)
    target = Wanted.of(pack([[*text, 0, 0] for text in held_out]), order, pack(training))
    mixture = Mixture((pack(corpus),))
    size = min(size, mixture.num_tokens)
    growth = grow(mixture, order, [size, mixture.num_tokens], {"text": target})
    beginning = unpack(next(iter(mixture.between(0, size))))
    for found, texts in zip(growth.shares["text"], (beginning, corpus), strict=True):
        held = grams(texts, order) + grams(training, order)
        assert found == pytest.approx(share(wanted, {gram for gram, count in held.items() if count > 1}))
    twice = sorted(count for count in grams(corpus, order).values() if count > 1)
    assert sorted(growth.whole.counts.tolist()) == twice


@given(texts_of_tokens, texts_of_tokens)
def test_a_training_split_alone_counts_like_counter(held_out: Texts, training: Texts) -> None:
    wanted = Wanted.of(pack(held_out), 1, pack(training))
    for min_count in (1, 2):
        held = {gram for gram, count in grams(training, 1).items() if count >= min_count}
        assert wanted.share_of_corpus(None, min_count) == pytest.approx(share(grams(held_out, 1), held))


def most_frequent(texts: Texts, num_rows: int, without: set[Gram]) -> set[Gram]:
    """Ties go to the smaller key, that is to the smaller tokens from the left."""
    counts = sorted((-count, gram) for gram, count in grams(texts, 2).items() if count > 1)
    return set([gram for _, gram in counts if gram not in without][:num_rows])


@given(texts_of_tokens, texts_of_tokens, texts_of_tokens, st.integers(0, 9))
def test_tables_of_a_budget_hold_the_most_frequent(
    general: Texts, own: Texts, held_out: Texts, num_rows: int
) -> None:
    wanted = grams([[*text, 0] for text in held_out], 2)
    target = Wanted.of(pack([[*text, 0] for text in held_out]), 2)
    budget = table_bytes(num_rows, bytes_per_row(2, 8, "float16"))
    ancestor, domain = (Ranking.of(Counts.of(pack(texts), 2)) for texts in (general, own))
    (found,) = table_shares(ancestor, target, [budget], order=2, hidden_size=8)
    above = most_frequent(general, num_rows, set())
    assert found == pytest.approx(share(wanted, above))
    (chained,) = chain_shares(ancestor, domain, target, [2 * budget], order=2, hidden_size=8)
    assert chained == pytest.approx(share(wanted, above | most_frequent(own, num_rows, above)))


def test_sets_of_both_formats_are_read(tmp_path: Path, encoder: TextEncoder) -> None:
    for name, content in {
        "lines": '{"text": "A first text", "label": "x"}\n{"text": "one\\nmore"}\n',
        "columns": "A\tDT\tO\nfirst\tJJ\tB\ntext\tNN\tO\n\n\none O\nmore O\n",
    }.items():
        (tmp_path / name).mkdir()
        for split in ("train.txt", "test.txt"):
            (tmp_path / name / split).write_text(content)
    (tmp_path / "other").mkdir()
    columns, lines = read_labelled_sets(tmp_path, encoder)
    expected = encoder.token_ids(["A first text", "one more"])
    assert (columns.name, lines.name) == ("columns", "lines")
    for each in (columns, lines):
        assert unpack(each.train) == unpack(each.test) == expected
    with pytest.raises(CorpusError, match=r"train\.txt"):
        read_labelled_sets(tmp_path / "other", encoder)


def write_group(folder: Path, words: str) -> Path:
    folder.mkdir()
    (folder / "a.txt").write_text(f"the {words} is there\n\nthe {words} is not there\n")
    (folder / "b.txt").write_text(f"and the {words} is here\n")
    (folder / "held_out.txt").write_text(f"the {words} is everywhere\n")
    return folder


def test_held_out_text_stays_out_of_the_corpus_with_cache_and_without(
    tmp_path: Path, encoder: TextEncoder
) -> None:
    folder = write_group(tmp_path / "topic", "cat")
    corpus = ["the cat is there", "the cat is not there", "and the cat is here"]
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        (group,) = folder_groups([folder], encoder, cache=cache, max_texts=None)
        assert unpack(group.corpus) == encoder.token_ids(corpus)
        assert unpack(group.held_out) == encoder.token_ids(["the cat is everywhere"])
    assert group.corpus.input_ids.dtype == torch.int32
    (folder / "a.txt").write_text("another text\n")
    (group,) = folder_groups([folder], encoder, cache=tmp_path / "cache", max_texts=None)
    assert unpack(group.corpus) == encoder.token_ids(["another text", "and the cat is here"])
    (group,) = folder_groups([folder], encoder, cache=tmp_path / "cache", max_texts=1)
    assert unpack(group.corpus) == encoder.token_ids(["another text"])
    (folder / "held_out.txt").write_text("\n")
    with pytest.raises(CorpusError, match="holds no text"):
        folder_groups([folder], encoder, cache=None, max_texts=None)
    (folder / "held_out.txt").unlink()
    with pytest.raises(CorpusError, match=r"held_out\.txt"):
        folder_groups([folder], encoder, cache=None, max_texts=None)


def test_no_texts_are_no_tokens(encoder: TextEncoder) -> None:
    assert tokenize([], encoder).num_tokens == 0


def test_the_command_writes_a_result_without_folders(tmp_path: Path) -> None:
    folders = [write_group(tmp_path / name, f"{name} table " * 80) for name in ("cat", "dog", "owl")]
    public = tmp_path / "sets" / "one"
    public.mkdir(parents=True)
    for split in ("train.txt", "test.txt"):
        (public / split).write_text(json.dumps({"text": "the cat is there"}))
    out = tmp_path / "result.json"
    options = ["--data", str(tmp_path / "sets"), "--domains", "cat", "dog", "--out", str(out), "--quick"]
    main(["--corpus", *map(str, folders), *options])
    result = BenchmarkResult.model_validate_json(out.read_text())
    assert result.is_quick
    assert str(tmp_path) not in out.read_text()
    assert "--corpus cat dog owl --data sets" in result.command
    for figure in dict.fromkeys(curve.figure for curve in result.curves):
        curves = [curve for curve in result.curves if curve.figure == figure]
        assert len({curve.x for curve in curves}) == 1, "curves of one figure share their sizes"
        assert all(0 <= value <= 1 for curve in curves for value in curve.y)
    chain = next(curve for curve in result.curves if curve.name == "chain of both")
    assert chain.y[-1] > 0
    sets = {item.name: item.value for item in result.quantities}
    assert sets["one: bigrams at least once in its training split"] == 1
    assert sets["one: bigrams at least twice in its training split"] == 0
