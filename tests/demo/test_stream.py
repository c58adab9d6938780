"""Mixed streams: every tenant once in a batch, texts of its domain, none twice while there are others."""

from collections import Counter
from pathlib import Path

import pytest

from hmi_engine.demo.stream import MixedStream, StreamSource, cut_to_tokens
from hmi_engine.models.tokenization import TextEncoder

SOURCE = StreamSource(
    tenants={"a1": "a", "a2": "a", "b1": "b"},
    texts={"a": [f"a {n}" for n in range(10)], "b": [f"b {n}" for n in range(4)] * 2},
)


def test_every_batch_asks_each_tenant_once_about_its_domain() -> None:
    requests = MixedStream(SOURCE).batches(4)
    for start in range(0, len(requests), 3):
        batch = requests[start : start + 3]
        assert Counter(request.tenant for request in batch) == Counter(list(SOURCE.tenants))
        assert all(request.text.startswith(SOURCE.tenants[request.tenant]) for request in batch)


def test_texts_come_again_only_when_they_are_used_up() -> None:
    stream = MixedStream(SOURCE)
    assert stream.num_fresh_batches() == 4
    texts = [request.text for request in stream.batches(4)]
    assert len(set(texts)) == len(texts)
    assert (stream.num_repeated, stream.num_fresh_batches()) == (0, 0)
    stream.batches(2)
    assert stream.num_repeated == 4


def test_order_of_tenants_changes_and_the_seed_fixes_it() -> None:
    first, again, other = (MixedStream(SOURCE, seed=seed).batches(4) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert len({tuple(request.tenant for request in first[i : i + 3]) for i in range(0, 12, 3)}) > 1


@pytest.mark.parametrize("limit", [4, 6, 64])
def test_texts_are_cut_to_whole_words(base_folder: Path, limit: int) -> None:
    encoder = TextEncoder(base_folder, 64)
    texts = ["alpha beta gamma delta epsilon zeta", "alpha", "beta gamma"]
    for text, cut in zip(texts, cut_to_tokens(texts, encoder, limit), strict=True):
        words = text.split()
        assert cut.split() == words[: min(len(words), limit - 2)]  # two special tokens
