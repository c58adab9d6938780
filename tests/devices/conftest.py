"""What tests of engines on devices share: tenants of all kinds, and the CPU's answers."""

from __future__ import annotations

from dataclasses import replace

import pytest

import hmi_engine as hmi
from hmi_engine.knowledge.adapter_kinds import KINDS
from hmi_engine.knowledge.adapters import random_adapter

LABELS = ("no", "yes", "maybe")


def soft(head):
    """Probabilities near 0 and 1 would hide differences."""
    return replace(head, weight=head.weight / 5)


@pytest.fixture
def fleet(store, make_head):
    """Twelve tenants of all kinds of adapters and of heads; their names."""

    def tenant(number):
        adapter = random_adapter(store.general, list(KINDS)[number % len(KINDS)], 1 + 5 * number % 16, number)
        head = soft(make_head(store.general, seed=number, pooling=("cls", "pooler", "mean")[number % 3]))
        if number % 4 == 1:
            head = hmi.TokenClassificationHead(labels=LABELS, weight=head.weight, bias=head.bias)
        elif number % 4 == 3:
            head = hmi.EmbeddingHead(pooling="mean")
        return hmi.NewTenant(f"t{number}", "words", adapter, head)

    store.add_tenants(map(tenant, range(12)))
    return [f"t{number}" for number in range(12)]


@pytest.fixture
def mixed_requests(fleet, make_sentences):
    """A function: so many requests, tenants in turn."""

    def make(count, seed=3):
        texts = make_sentences(count, seed=seed)
        return [hmi.Request(fleet[(n * 5) % len(fleet)], text=text) for n, text in enumerate(texts)]

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
