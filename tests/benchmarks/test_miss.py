"""The benchmark of misses: what it counts is what plain Python counts, and its systems compute the same."""

import itertools
from collections import Counter

import pytest
from conftest import sentences, write_bert

import hmi_engine as hmi
from benchmarks.figures import draw_curves
from benchmarks.miss_costs import floor_in_tokens, miss_cases, sixty_four_token_sequences
from benchmarks.miss_throughput import POLICIES, break_even, throughput
from hmi_engine.models.bert_loading import BertConfiguration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("miss")


@pytest.fixture(scope="module")
def model(folder):
    return write_bert(folder / "model", max_position_embeddings=64)


@pytest.fixture(scope="module", params=[2, 3])
def store(request, folder, model):
    path = folder / f"store{request.param}"
    with hmi.Store.create(path, general=model, plot_layers=2, window=request.param) as opened:
        opened.add_domain("words", sentences(60, seed=1))
        yield opened


def test_sequences_are_the_texts_laid_end_to_end():
    texts = [list(range(start, start + 50)) for start in (0, 50, 100, 150)]
    batches = sixty_four_token_sequences(texts, 2)
    assert [batch.lengths for batch in batches] == [(64, 64)]
    assert batches[0].input_ids.tolist() == list(range(128))
    assert [batch.lengths for batch in sixty_four_token_sequences(texts, 8)] == [(64, 64, 64)]


def test_costs_are_of_the_windows_that_have_no_row(store):
    batches = sixty_four_token_sequences(store.encoder.token_ids(sentences(60, seed=2)), 2)[:2]
    cases, quantities = miss_cases(store, "words", batches, 2)
    corpus = Counter()
    for ids in store.encoder.token_ids(sentences(60, seed=1)):
        corpus.update(zip(*(ids[start:] for start in range(store.general.window)), strict=False))
    missing = Counter()
    for ids in itertools.chain.from_iterable(batch.input_ids.split(batch.lengths) for batch in batches):
        tokens = ids.tolist() if store.general.window == 2 else [-1, *ids.tolist(), -1]
        windows = zip(*(tokens[start:] for start in range(store.general.window)), strict=False)
        # Windows at the ends of these sequences lack a token; the table has such only as bigrams.
        missing.update(window for window in windows if -1 in window or corpus[window] < 2)
    full = {window: count for window, count in missing.items() if -1 not in window}
    ends = sum(missing.values()) - sum(full.values())
    distinct, occurrences = cases
    assert 0 <= occurrences.settings["windows"] - sum(full.values()) <= ends
    assert 0 <= distinct.settings["windows"] - len(full) <= ends
    assert [len(case.systems) for case in cases] == [4, 6]
    assert quantities[0].value == occurrences.settings["windows"] / occurrences.settings["tokens"]


def test_floor():
    """Multiplications counted one matrix after the other."""
    configuration = BertConfiguration(6, 384, 12, 1536, 30522, 512, 1e-12)

    def layer(keys, projections=3):
        linear = [(384, 384)] * (projections + 1) + [(384, 1536), (1536, 384)]
        return sum(rows * columns for rows, columns in linear) + 2 * keys * 384

    for window in (2, 3):
        expected = window * (layer(window, 0) + 2 * layer(window)) / (3 * layer(64))
        assert floor_in_tokens(configuration, window, 3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0.5, 0.75, 1.25], 0.75),
        ([1.0, 1.5, 2.0], 0.0),
        ([0.2, 0.4, 0.9], None),
        ([1.1, 0.9, 1.1], 0.75),
    ],
)
def test_break_even(times, expected):
    found = break_even([0.0, 0.5, 1.0], times)
    assert found == (None if expected is None else pytest.approx(expected))


def test_throughput_over_hit_rates(store, folder, model):
    rounds = [sentences(6, seed=seed) for seed in (11, 12)]
    plain_path = folder / f"plain{store.general.window}"
    with hmi.Store.create(plain_path, general=model, plot_layers=0) as plain:
        cases, curves, quantities = throughput(store, plain, rounds, [0.0, 0.5, 1.0])
    assert [curve.name for curve in curves] == list(POLICIES) and len(cases) == 3
    assert len(quantities) == len(POLICIES)
    for curve in curves:
        assert curve.x[0] == 0.0 and curve.x == tuple(sorted(curve.x))
        assert all(value > 0 for value in curve.y)
    if store.general.window == 2:
        assert curves[0].x[-1] == 100.0 and 40 <= curves[0].x[1] <= 75
    assert draw_curves(curves, folder / "figure.svg").stat().st_size > 1000
