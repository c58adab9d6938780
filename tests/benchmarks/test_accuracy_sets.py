"""The labelled sets of the accuracy study are read as they are, and cut without losing a word."""

import json
import os
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benchmarks.accuracy_study.pieces import cut_sentences, join_tags
from benchmarks.accuracy_study.sets import ClassificationSet, TaggingSet, read_sets
from benchmarks.accuracy_study.stores import table_texts, unlabelled_texts
from hmi_engine.construct.objectives.token_classification import sentence_text
from hmi_engine.errors import HmiError, TrainingDataError
from hmi_engine.knowledge.examples import Example, TaggedExample

DATA = os.environ.get("HMI_TEXT_SETS")

COUNTS = {
    "chemprot": (4169, 2427, 3469),
    "sci-cite": (7320, 916, 1861),
    "citation-intent": (1688, 114, 139),
    "ncbi-disease": (135_701, 23_969, 24_497),
    "scierc": (45_412, 6_521, 13_401),
}
"""Texts, or words of tagged sentences, of train, dev and test, as the sets' own page counts them."""


def _write_set(folder, **splits):
    folder.mkdir(parents=True)
    for split, text in splits.items():
        (folder / f"{split}.txt").write_text(text)


def _line(text, label="a"):
    return json.dumps({"text": text, "label": label, "metadata": {}}) + "\n"


def test_json_lines(tmp_path):
    text = "a line\u2028separator in a text"
    _write_set(
        tmp_path / "intent", train=_line(text) + _line("other", "b"), dev=_line("x"), test=_line("y", "b")
    )
    (tmp_path / "no set").mkdir()
    (found,) = read_sets(tmp_path)
    assert isinstance(found, ClassificationSet) and found.name == "intent" and found.labels == ("a", "b")
    assert found.train == (Example(text, "a", 1), Example("other", "b", 2))
    assert found.test == (Example("y", "b", 1),)
    assert found.held_out_texts() == {"x", "y"}


@pytest.mark.parametrize("separator", ["\t", " "])
def test_tagged_words(tmp_path, separator):
    lines = [["APC2", "NN", "O", "B-Gene"], ["is", "VB", "O", "O"], [], ["p53", "NN", "O", "B-Gene"]]
    text = "\n".join(separator.join(line) for line in lines)
    _write_set(tmp_path / "genes", train=text, dev=text + "\n\n\n", test=text + "\n")
    (found,) = read_sets(tmp_path)
    assert isinstance(found, TaggingSet) and found.labels == ("B-Gene", "O")
    expected = (TaggedExample(("APC2", "is"), ("B-Gene", "O"), 1), TaggedExample(("p53",), ("B-Gene",), 4))
    assert found.train == found.dev == found.test == expected
    assert found.training_texts() == ("APC2 is", "p53")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (_line("x") + '{"text": "no label"}\n', "train.txt:2"),
        (_line("x") + "no JSON\n", "train.txt:2"),
        (_line("x"), "label 'b'"),
        ("word\n", "train.txt:1"),
    ],
)
def test_bad_files(tmp_path, train, message):
    _write_set(tmp_path / "bad", train=train, dev=_line("x"), test=_line("y", "b"))
    with pytest.raises(HmiError, match=message):
        read_sets(tmp_path)


def test_no_sets(tmp_path):
    with pytest.raises(TrainingDataError, match="no folder"):
        read_sets(tmp_path)


@pytest.mark.skipif(DATA is None, reason="set HMI_TEXT_SETS to the folder of the five public sets")
def test_the_public_sets_are_whole():
    assert DATA is not None
    found = {}
    for labelled in read_sets(Path(DATA)):
        splits = (labelled.train, labelled.dev, labelled.test)
        is_tagged = isinstance(labelled, TaggingSet)
        found[labelled.name] = tuple(
            sum(len(item.words) for item in split) if is_tagged else len(split) for split in splits
        )
    assert found == COUNTS


def test_tables_hold_no_held_out_text():
    def made(name, train, dev, test):
        return ClassificationSet(
            name, *(tuple(Example(text, "a", 0) for text in split) for split in (train, dev, test))
        )

    texts = [f"text {number}" for number in range(100)]
    first = made("first", [*texts, "twice", "twice"], ["text 3"], ["text 4"])
    second = made("second", ["other", "text 5"], ["text 6"], ["twice"])
    sets = [first, second]
    allowed = [text for text in texts if text not in {"text 3", "text 4", "text 6"}]
    assert table_texts("own", first, sets) == tuple(allowed)
    assert set(table_texts("all", second, sets)) == {*allowed, "other"}
    assert set(table_texts("all", first, sets)) == set(table_texts("all", second, sets))
    half = table_texts("half", first, sets)
    assert len(half) == len(set(half)) == round(len(allowed) / 2) and set(half) < set(allowed)
    assert half == table_texts("half", first, sets)


def test_unlabelled_texts_are_those_of_the_other_sets():
    def made(name, train, test):
        return ClassificationSet(
            name, *(tuple(Example(text, "a", 0) for text in split) for split in (train, train[:1], test))
        )

    first = made("first", [f"first {number}" for number in range(20)], ["second 3"])
    second = made("second", [f"second {number}" for number in range(20)], ["first 4"])
    found = unlabelled_texts(first, [first, second])
    assert set(found) == {f"second {number}" for number in range(1, 20) if number != 3}
    assert found == unlabelled_texts(first, [first, second])


WORDS = st.sampled_from(["the", "cat", "catalysis", "p53", "under", "a-b-c", "intracellularly", "42", "."])


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return AutoTokenizer.from_pretrained(minilm)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(WORDS, min_size=1, max_size=40), min_size=1, max_size=4), st.integers(4, 20))
def test_pieces_fit_and_join_again(tokenizer, sentences, max_tokens):
    def num_tokens(words):
        return len(tokenizer(sentence_text(words))["input_ids"])

    tagged = [
        TaggedExample(tuple(words), tuple(f"B-{place}" for place in range(len(words)))) for words in sentences
    ]
    cut = cut_sentences(tagged, tokenizer, max_tokens)
    for sentence, pieces in zip(tagged, cut, strict=True):
        assert tuple(word for piece in pieces for word in piece.words) == sentence.words
        for piece in pieces:
            assert (
                len(tokenizer(sentence_text(piece.words))["input_ids"]) <= max_tokens or len(piece.words) == 1
            )
        for piece, following in pairwise(pieces):
            assert len(tokenizer(sentence_text((*piece.words, following.words[0])))["input_ids"]) > max_tokens
    assert join_tags(cut, [piece.tags for pieces in cut for piece in pieces]) == [
        list(item.tags) for item in tagged
    ]
