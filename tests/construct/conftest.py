"""Small stores, bases and labelled texts for the tests of training."""

from collections.abc import Callable
from pathlib import Path

import pytest

import hmi_engine as hmi
from hmi_engine.knowledge.examples import Example


@pytest.fixture
def make_store(tiny_bert: Path, tmp_path: Path) -> Callable[..., hmi.Store]:
    """Makes a store of the random BERT; the caller adds domains."""
    opened: list[hmi.Store] = []

    def make(plot_layers: int = 2, window: int = 2) -> hmi.Store:
        path = tmp_path / f"store-{len(opened)}"
        opened.append(hmi.Store.create(path, general=tiny_bert, plot_layers=plot_layers, window=window))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


TOPICS = {
    "biology": ("cell", "protein", "gene", "drug", "binds"),
    "computing": ("server", "socket", "client", "file", "parse"),
    "numbers": ("matrix", "sum", "mean", "value", "number"),
}


@pytest.fixture
def topic_examples(make_sentences) -> Callable[..., list[Example]]:
    """Texts that hold two words of a topic among others; the topic is the label."""

    def make(count: int, seed: int) -> list[Example]:
        labels = sorted(TOPICS)
        examples = []
        for number, text in enumerate(make_sentences(count, seed=seed, longest=8)):
            label = labels[(number * 7 + seed) % len(labels)]
            first, second = (TOPICS[label][(number + shift) % len(TOPICS[label])] for shift in (0, 2))
            examples.append(Example(f"{first} {text} {second}", label, number + 1))
        return examples

    return make
