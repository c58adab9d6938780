"""Dropout while training: what it draws, and that it stands where transformers' BERT has its own."""

import pytest
import torch
from torch import nn
from transformers import BertModel

from hmi_engine.construct.hidden_dropout import HiddenDropout
from hmi_engine.construct.trainable_adapter import TrainableAdapter
from hmi_engine.construct.trainable_layers import DenseBatch, TrainableLayers

SCALE = 0.7


def test_a_share_is_zero_and_the_mean_stays():
    x = torch.ones(200_000, requires_grad=True)
    dropped = HiddenDropout(0.3, seed=1)(x)
    assert (dropped == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert dropped[dropped != 0].unique().item() == pytest.approx(1 / 0.7)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, dropped.detach())


def test_its_own_generator_decides():
    x = torch.ones(1000)
    one, other = HiddenDropout(0.5, seed=3), HiddenDropout(0.5, seed=3)
    first = one(x)
    torch.manual_seed(0)
    assert torch.equal(first, other(x)) and not torch.equal(first, one(x))


def test_nothing_is_dropped_without_gradients():
    x = torch.ones(10)
    assert HiddenDropout()(x) is x
    with torch.no_grad():
        assert HiddenDropout(0.9)(x) is x


class _Scale(nn.Module):
    def forward(self, x):
        return SCALE * x


class _Scaled(HiddenDropout):
    def __call__(self, x):
        return SCALE * x


@pytest.mark.parametrize("reading", ["cls", "mean"])
def test_it_stands_where_transformers_has_it(make_store, tiny_bert, reading):
    """With dropout replaced by a factor here and there, both compute the same."""
    base = make_store(plot_layers=0)
    adapter = TrainableAdapter(
        base.general, kind="lora", rank=2, layers=(1, 2, 3), generator=torch.Generator().manual_seed(0)
    )
    states = torch.randn(3, 7, base.general.hidden_size)
    layers = TrainableLayers(base.model, adapter, _Scaled(0.1))
    found = layers.read(DenseBatch(states, torch.full((3,), 7)), reading)

    theirs = BertModel.from_pretrained(tiny_bert, attn_implementation="eager").eval()
    expected = SCALE * states
    for layer in theirs.encoder.layer[1:]:
        layer.attention.output.dropout = layer.output.dropout = _Scale()
        result = layer(expected)
        expected = result[0] if isinstance(result, tuple) else result
    expected = SCALE * (expected[:, 0] if reading == "cls" else expected.mean(1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
