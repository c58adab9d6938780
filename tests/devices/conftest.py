"""What tests of engines on devices share: a store with tenants of all kinds, and how answers compare."""

from __future__ import annotations

import pytest
import torch

import hmi_engine as hmi
from hmi_engine.knowledge.adapter_kinds import KINDS
from hmi_engine.knowledge.adapters import random_adapter
from hmi_engine.models import linear


@pytest.fixture
def plain_products(monkeypatch):
    """A device made of the CPU has no weights that oneDNN reordered."""
    monkeypatch.setattr(linear, "has_packed_matmul", lambda: False)


LABELS = ("no", "yes", "maybe")
NUM_TENANTS = 12


@pytest.fixture(scope="module")
def store(tiny_bert, tmp_path_factory, corpus):
    """A store with K = 2, bigram windows, a domain ``words`` and tenants ``t0`` to ``t11``."""
    path = tmp_path_factory.mktemp("devices") / "store"
    with hmi.Store.create(path, general=tiny_bert, plot_layers=2) as opened:
        opened.add_domain("words", corpus)
        opened.add_tenants(_tenant(opened.general, number) for number in range(NUM_TENANTS))
        yield opened


def _tenant(general, number):
    """Of each kind of adapter in turn, with each kind of head."""
    generator = torch.Generator().manual_seed(number)
    # Small, as probabilities near 0 and 1 would hide differences.
    weight = torch.randn(len(LABELS), general.hidden_size, generator=generator) / 5
    bias = torch.randn(len(LABELS), generator=generator)
    if number % 4 == 1:
        head = hmi.TokenClassificationHead(labels=LABELS, weight=weight, bias=bias)
    elif number % 4 == 3:
        head = hmi.EmbeddingHead(pooling="mean")
    else:
        pooling = ("cls", "pooler", "mean")[number % 3]
        head = hmi.ClassificationHead(labels=LABELS, weight=weight, bias=bias, pooling=pooling)
    adapter = random_adapter(general, list(KINDS)[number % len(KINDS)], 1 + 5 * number % 16, number)
    return hmi.NewTenant(f"t{number}", "words", adapter, head)


@pytest.fixture
def mixed_requests(make_sentences):
    """A function: so many requests, tenants in turn."""

    def make(count, seed=3):
        texts = make_sentences(count, seed=seed)
        return [hmi.Request(f"t{number * 5 % NUM_TENANTS}", text=text) for number, text in enumerate(texts)]

    return make


def numbers_of(response):
    """All that a response says, as numbers."""
    assert response.error is None, response.error
    if response.kind == "embedding":
        return response.embedding.tolist()
    if response.kind == "token_classification":
        return [value for tag in response.tags for value in (LABELS.index(tag.label), tag.score)]
    return list(response.scores.values())


def assert_same(responses, expected, tolerance=1e-4):
    """Equal answers, in order, to the tolerance."""
    for response, wanted in zip(responses, expected, strict=True):
        assert numbers_of(response) == pytest.approx(numbers_of(wanted), abs=tolerance)


@pytest.fixture
def same():
    """The function :func:`assert_same`."""
    return assert_same
