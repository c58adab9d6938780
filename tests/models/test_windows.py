"""Windows through the domain layers: memory of projections, threads, all widths; against transformers."""

import threading

import pytest
import torch
from reference_hbert import run_window
from transformers import BertModel

from hmi_engine.models.windows import WindowLayers, fill_places

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def reference(tiny_bert):
    return BertModel.from_pretrained(tiny_bert).eval()


@pytest.fixture
def model(store):
    return store.model


def windows(count, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 60, (count, width), generator=generator, dtype=torch.int32)
    absent = torch.rand(count, width, generator=generator) < 0.2
    return tokens.masked_fill(absent, -1)


@torch.no_grad()
def check(states, tokens, reference):
    for row, window in zip(states, tokens.tolist(), strict=True):
        expected = torch.zeros_like(row)
        if any(token >= 0 for token in window):
            for slot, state in run_window(reference, [t if t >= 0 else None for t in window], 2).items():
                expected[slot] = state
        torch.testing.assert_close(row, expected, **TOLERANCE)


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("projection_bytes", [0, 5 * 4 * 32 * 4, 1 << 20])
def test_windows_whatever_the_memory_of_projections(model, reference, width, projection_bytes):
    layers = WindowLayers(model.embed, model.layers[:2], projection_bytes=projection_bytes)
    for seed in range(2):
        tokens = windows(12, width, seed)
        check(layers(tokens), tokens, reference)


def test_more_windows_than_one_step(model, reference, monkeypatch):
    monkeypatch.setattr("hmi_engine.models.windows.ROWS_PER_STEP", 7)
    tokens = windows(20, 3)
    check(model.window_states(tokens), tokens, reference)


def test_no_windows(model):
    assert model.window_states(torch.empty(0, 2, dtype=torch.int32)).shape == (0, 2, 32)


def test_no_domain_layers(model):
    with pytest.raises(ValueError, match="plot_layers is 0"):
        WindowLayers(model.embed, [])


def test_many_threads_fill_the_projections(model):
    tokens = [windows(40, 3, seed) for seed in range(8)]
    expected = [WindowLayers(model.embed, model.layers[:2])(each) for each in tokens]
    shared = WindowLayers(model.embed, model.layers[:2], projection_bytes=60 * 4 * 32 * 4)
    found = [None] * len(tokens)

    def work(number):
        found[number] = shared(tokens[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(tokens))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, **TOLERANCE)


def test_a_place_without_a_token_holds_the_placeholder():
    tokens = torch.tensor([[7, -1, 8], [-1, 9, -1]], dtype=torch.int32)
    assert fill_places(tokens, 4).tolist() == [[7, 4, 8], [4, 9, 4]]
    with pytest.raises(ValueError, match="domain layers"):
        fill_places(tokens, None)
