"""The peers answer alike: merged models, PEFT mixed and PEFT one at a time compute the same function."""

import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, BertForSequenceClassification

from hmi_engine.demo.peers import (
    OneModelPerTenant,
    Peer,
    PeftMixedBatch,
    PeftOneAtATime,
    ServedTenant,
    answer_stream,
    tune,
)
from hmi_engine.models.tokenization import TextEncoder
from hmi_engine.request import Request

from .conftest import WORDS

PEERS = (OneModelPerTenant, PeftMixedBatch, PeftOneAtATime)


@pytest.fixture(scope="module")
def requests(peft_tenants: list[ServedTenant]) -> list[Request]:
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 20))) for _ in range(23)]
    return [Request(draw.choice(peft_tenants).name, text, id=number) for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def expected(
    base_folder: Path, peft_tenants: list[ServedTenant], requests: list[Request]
) -> list[list[float]]:
    """Probabilities by plain PEFT, one text and one adapter at a time, with the tenant's own head."""
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    models = {
        tenant.name: PeftModel.from_pretrained(
            BertForSequenceClassification.from_pretrained(base_folder, num_labels=len(tenant.labels)),
            tenant.directory,
        ).eval()
        for tenant in peft_tenants
    }
    with torch.no_grad():
        return [
            models[request.tenant](**tokenizer(request.text, return_tensors="pt"))
            .logits.softmax(-1)[0]
            .tolist()
            for request in requests
        ]


@pytest.mark.parametrize("max_sequences", [32, 3, 1])
@pytest.mark.parametrize("peer_class", PEERS)
def test_peer_gives_the_probabilities_of_plain_peft(
    peer_class: type[OneModelPerTenant | PeftMixedBatch | PeftOneAtATime],
    max_sequences: int,
    base_folder: Path,
    peft_tenants: list[ServedTenant],
    requests: list[Request],
    expected: list[list[float]],
) -> None:
    peer = peer_class(base_folder, TextEncoder(base_folder, 64), max_sequences=max_sequences)
    peer.prepare(peft_tenants)
    responses = answer_stream(peer, requests, batch_size=10)
    assert [response.id for response in responses] == [request.id for request in requests]
    for request, response, probabilities in zip(requests, responses, expected, strict=True):
        labels = next(tenant.labels for tenant in peft_tenants if tenant.name == request.tenant)
        assert tuple(response.scores) == labels
        assert list(response.scores.values()) == pytest.approx(probabilities, abs=1e-4)
        assert response.label == labels[probabilities.index(max(probabilities))]
    peer.close()


def test_tenants_differ(expected: list[list[float]]) -> None:
    """Otherwise the comparison above would prove nothing."""
    assert len({tuple(round(p, 3) for p in probabilities) for probabilities in expected}) > 10


def test_tune_sets_a_candidate_and_keeps_the_answers(
    base_folder: Path, peft_tenants: list[ServedTenant], requests: list[Request]
) -> None:
    peer = PeftMixedBatch(base_folder, TextEncoder(base_folder, 64))
    peer.prepare(peft_tenants)
    before = [response.scores for response in peer.run(requests)]
    seconds = tune(peer, requests, candidates=(4, 2))
    assert set(seconds) == {4, 2}
    assert peer.max_sequences == min(seconds, key=lambda candidate: seconds[candidate])
    for scores, response in zip(before, peer.run(requests), strict=True):
        assert list(scores.values()) == pytest.approx(list(response.scores.values()), abs=1e-4)


def test_peers_have_the_interface(base_folder: Path) -> None:
    encoder = TextEncoder(base_folder, 64)
    peers: list[Peer] = [peer_class(base_folder, encoder) for peer_class in PEERS]
    assert len({peer.name for peer in peers}) == len(PEERS)
    assert all(peer.description for peer in peers)
