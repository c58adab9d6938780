"""Encoding, splitting and batching of examples."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from hmi_engine.construct.objectives.classification import ClassificationObjective
from hmi_engine.construct.training_data import (
    EncodedTexts,
    TaskData,
    encode_texts,
    length_batches,
    random_split,
    stratified_split,
)
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import TrainingDataError
from hmi_engine.knowledge.examples import Example
from hmi_engine.models.tokenization import TextEncoder


@pytest.fixture(scope="module")
def encoder(tiny_bert):
    return TextEncoder(tiny_bert, 48)


@pytest.mark.parametrize("max_tokens", [3, 7, 48, 60])
def test_cutting_equals_the_tokenizers_truncation(encoder, tiny_bert, make_sentences, max_tokens):
    texts = make_sentences(30, longest=80)
    data = encode_texts(texts, encoder, max_tokens)
    tokenizer = Tokenizer.from_file(str(tiny_bert / "tokenizer.json"))
    tokenizer.no_truncation()
    assert data.full_ids == [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    tokenizer.enable_truncation(min(max_tokens, 48))
    encodings = tokenizer.encode_batch(texts)
    assert data.token_ids == [encoding.ids for encoding in encodings]
    assert data.num_cut == sum(bool(encoding.overflowing) for encoding in encodings)


def test_labels_are_sorted(encoder):
    examples = [Example("the cell", label, line) for line, label in enumerate("bcab")]
    objective = ClassificationObjective.learn(examples, TrainingSettings())
    assert objective.labels == ("a", "b", "c")
    assert objective.majority == 1
    assert objective.encode(examples, encoder, 16).batch_targets(range(4)).tolist() == [1, 2, 0, 1]
    assert objective.encode(examples[:1], encoder, 16).batch_targets([0]).tolist() == [1]


def test_digest_depends_on_every_text_and_label(encoder):
    objective = ClassificationObjective.learn([Example("the", label) for label in "abc"], TrainingSettings())

    def digest(*pairs):
        return objective.encode([Example(*pair, 1) for pair in pairs], encoder, 16).sha256

    digests = {
        digest(("the", "a"), ("cell", "b")),
        digest(("cell", "b"), ("the", "a")),
        digest(("the", "a"), ("cell", "c")),
        digest(("the", "a")),
    }
    assert len(digests) == 4
    assert digest(("the", "a")) == digest(("the", "a"))


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=3), min_size=1, max_size=6),
    st.integers(0, 2**40),
)
def test_texts_of_a_batch_are_in_columns(readings, seed):
    """Those that examples read first come first, whatever else some of them read."""
    data = TaskData(EncodedTexts((), [], []), [], [tuple(reading) for reading in readings], "")
    order = torch.randperm(len(readings), generator=torch.Generator().manual_seed(seed)).tolist()
    found = data.batch_texts(order)
    assert found[: len(order)] == [readings[number][0] for number in order]
    assert sorted(found) == sorted(text for reading in readings for text in reading)


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=5).filter(lambda sizes: max(sizes) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 2**40),
)
def test_split_holds_out_a_share_of_every_label(sizes, fraction, seed):
    targets = [label for label, size in enumerate(sizes) for _ in range(size)]
    split = stratified_split(targets, len(sizes), fraction, torch.Generator().manual_seed(seed))
    assert sorted(split.training + split.validation) == list(range(sum(sizes)))
    held = Counter(targets[number] for number in split.validation)
    for label, size in enumerate(sizes):
        assert min(1, size - 1) <= held[label] <= size - 1
        assert abs(held[label] - size * fraction) <= 1


def test_too_few_examples():
    with pytest.raises(TrainingDataError, match="each of the 2 labels has a single example"):
        stratified_split((0, 1), 2, 0.2, torch.Generator())
    with pytest.raises(TrainingDataError, match="only 1 training example"):
        random_split(1, 0.2, torch.Generator())


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
