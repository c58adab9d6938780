"""Encoding, splitting and batching of labelled texts."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hmi_engine.construct.training_data import (
    LabelledTexts,
    encode_examples,
    length_batches,
    stratified_split,
)
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.corpus import Example
from hmi_engine.models.tokenization import TextEncoder


@pytest.fixture(scope="module")
def encoder(tiny_bert):
    return TextEncoder(tiny_bert, 48)


@pytest.mark.parametrize("max_tokens", [3, 7, 48, 60])
def test_cutting_equals_the_tokenizers_truncation(encoder, tiny_bert, make_sentences, max_tokens):
    texts = make_sentences(30, longest=80)
    data = encode_examples([Example(text, "x", 1) for text in texts], encoder, max_tokens)
    tokenizer = Tokenizer.from_file(str(tiny_bert / "tokenizer.json"))
    tokenizer.no_truncation()
    assert data.full_ids == [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    tokenizer.enable_truncation(min(max_tokens, 48))
    assert data.token_ids == [encoding.ids for encoding in tokenizer.encode_batch(texts)]


def test_labels_are_sorted_and_may_be_given(encoder):
    examples = [Example("the cell", label, line) for line, label in enumerate("bcab")]
    data = encode_examples(examples, encoder, 16)
    assert data.labels == ("a", "b", "c")
    assert data.targets == (1, 2, 0, 1)
    assert data.majority == 1
    assert encode_examples(examples[:1], encoder, 16, ("a", "b", "c")).targets == (1,)


def test_digest_depends_on_every_text_and_label(encoder):
    def digest(*pairs):
        return encode_examples([Example(*pair, 1) for pair in pairs], encoder, 16).sha256()

    digests = {
        digest(("the", "a"), ("cell", "b")),
        digest(("cell", "b"), ("the", "a")),
        digest(("the", "a"), ("cell", "c")),
        digest(("the", "a")),
    }
    assert len(digests) == 4
    assert digest(("the", "a")) == digest(("the", "a"))


@pytest.mark.parametrize(
    ("examples", "labels", "message"),
    [
        ([], None, "no training examples"),
        ([Example("  ", "a", 7)], None, "line 7"),
        ([Example("the", "", 8)], None, "line 8"),
        ([Example("the", "z", 1)], ("a", "b"), "'z'.*no training example"),
    ],
)
def test_bad_examples(encoder, examples, labels, message):
    with pytest.raises(TrainingDataError, match=message):
        encode_examples(examples, encoder, 16, labels)


def labelled(targets):
    labels = tuple(f"label {number}" for number in range(max(targets) + 1))
    return LabelledTexts(
        ("text",) * len(targets), [[1]] * len(targets), [[1]] * len(targets), tuple(targets), labels
    )


@settings(deadline=None)
@given(
    st.lists(st.integers(2, 30), min_size=2, max_size=5),
    st.floats(0.01, 0.99),
    st.integers(0, 2**40),
)
def test_split_holds_out_a_share_of_every_label(sizes, fraction, seed):
    data = labelled([label for label, size in enumerate(sizes) for _ in range(size)])
    split = stratified_split(data, fraction, torch.Generator().manual_seed(seed))
    assert sorted(split.training + split.validation) == list(range(sum(sizes)))
    held = Counter(data.targets[number] for number in split.validation)
    for label, size in enumerate(sizes):
        assert 1 <= held[label] <= size - 1
        assert abs(held[label] - size * fraction) <= 1


@pytest.mark.parametrize(
    ("targets", "message"),
    [((0, 0, 0), "'label 0'; a classifier needs two"), ((0, 0, 1), "'label 1'.*single")],
)
def test_too_few_examples_or_labels(targets, message):
    with pytest.raises(TrainingDataError, match=message):
        stratified_split(labelled(targets), 0.2, torch.Generator())


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(1, 9), st.integers(0, 2**40))
def test_batches_are_a_partition(lengths, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = list(length_batches(range(len(lengths)), lengths, batch_size, generator))
    assert sorted(number for batch in batches for number in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)


def test_batches_hold_texts_of_similar_length():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 100, (1000,), generator=generator).tolist()
    batches = list(length_batches(range(1000), lengths, 16, generator))
    padded = sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)
    assert padded < 1.2 * sum(lengths)
