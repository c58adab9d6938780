"""No tenant sees another's weights, names reach no file, and nobody's answer hangs on its neighbours.

Each fault that a peer shipped is named by the peer's issue.
"""

import sys
from dataclasses import replace

import pytest
import torch

import hmi_engine as hmi
from hmi_engine.knowledge.adapter_kinds import KINDS
from hmi_engine.knowledge.adapters import Site, random_adapter

KIND_NAMES = [*KINDS, "none"]


def add_tenants(store, count, make_head, *, domain="words"):
    """Tenants of all kinds in turn, some without any block, each with weights of its own."""

    def adapter(number):
        kind = KIND_NAMES[number % len(KIND_NAMES)]
        if kind == "none":
            return hmi.Adapter({})
        return random_adapter(store.general, kind, 1 + number % 9, number, sites=KINDS[kind].sites[:4])

    def tenant(number):
        head = make_head(store.general, seed=number, pooling="cls")
        head = replace(head, weight=head.weight / 5)  # probabilities near 0 and 1 would hide differences
        return hmi.NewTenant(f"team/{number:04d}", domain, adapter(number), head)

    store.add_tenants(map(tenant, range(count)))
    return [f"team/{number:04d}" for number in range(count)]


def requests_for(names, make_sentences, seed=7):
    texts = make_sentences(len(names), seed=seed)
    return [hmi.Request(name, text=text) for name, text in zip(names, texts, strict=True)]


def scores(responses):
    assert [response.error for response in responses] == [None] * len(responses)
    return torch.tensor([list(response.scores.values()) for response in responses])


def one_at_a_time(engine, requests):
    return scores([engine.run([request])[0] for request in requests])


def test_a_thousand_tenants_at_once_answer_as_each_alone(store, make_head, make_sentences):
    requests = requests_for(add_tenants(store, 1000, make_head), make_sentences)
    with hmi.Engine(store) as engine:
        together = scores(engine.run(requests))
        torch.testing.assert_close(together, one_at_a_time(engine, requests), atol=1e-4, rtol=0)
    distinct = torch.unique(together.round(decimals=5), dim=0)
    assert len(distinct) > 990, "tenants with weights of their own answer differently"


def test_base_and_n_adapters_in_one_batch_sglang_23141(store, make_head, make_sentences):
    add_tenants(store, 10, make_head)
    head = make_head(store.general, pooling="cls")
    store.add_tenant("base", domain="words", adapter=hmi.Adapter({}), head=head)
    names = ["base", "team/0000", "base", "team/0001", "team/0002", "base", "team/0003", "team/0004"]
    requests = requests_for(names, make_sentences)
    with hmi.Engine(store) as engine:
        together = scores(engine.run(requests))
        torch.testing.assert_close(together, one_at_a_time(engine, requests), atol=1e-5, rtol=0)
        alone = scores(engine.run([request for request in requests if request.tenant == "base"]))
    is_base = torch.tensor([name == "base" for name in names])
    torch.testing.assert_close(together[is_base], alone, atol=1e-5, rtol=0)


def test_more_adapters_than_any_batch_before_sglang_28371(store, make_head, make_sentences):
    requests = requests_for(add_tenants(store, 200, make_head), make_sentences)
    with hmi.Engine(store) as engine:
        engine.run(requests[:2])
        many = scores(engine.run(requests))
        torch.testing.assert_close(many, one_at_a_time(engine, requests), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "a/../../outside",
        "/etc/passwd",
        "a/b/c",
        ".hidden",
        "a//b",
        "outside\0",
        "a\\..\\b",
        "%2e%2e/outside",
        "tenants/01/1.1.safetensors",
        "x" * 65,
    ],
)
def test_names_in_requests_open_no_file_vllm_46287(store, tmp_path, make_head, name):
    (tmp_path / "outside").write_text("secret")
    opened = []
    listening = True

    def listen(event, arguments):
        if listening and event == "open":
            opened.append(str(arguments[0]))

    with hmi.Engine(store) as engine:
        engine.run([hmi.Request("nobody", text="the cell")])
        sys.addaudithook(listen)
        (response,) = engine.run([hmi.Request(name, text="the cell")])
        listening = False
    assert isinstance(response.error, hmi.HmiError)
    assert opened == []
    with pytest.raises(hmi.HmiError):
        store.add_tenant(
            name, domain="words", adapter=hmi.Adapter({}), head=make_head(store.general, pooling="cls")
        )


def test_a_malformed_adapter_is_refused_when_added_vllm_11727(store, make_head):
    adapter = random_adapter(store.general, "lora", 4, 0)
    (place, block), *_ = adapter.blocks.items()
    wrong = [
        replace(block, a=block.a.T),
        replace(block, b=block.b[:, :-1]),
        replace(block, a=block.a.fill_diagonal_(float("nan"))),
    ]
    before = {info.name for info in store.tenants.values()}
    for bad in wrong:
        with pytest.raises(hmi.errors.InvalidAdapterError, match=r"layer \d, query"):
            store.add_tenant(
                "bad", domain="words", adapter=hmi.Adapter({place: bad}), head=make_head(store.general)
            )
    assert {info.name for info in store.tenants.values()} == before
    assert store.verify() == []


def test_an_adapter_larger_than_an_engine_s_memory_is_refused_when_added(store, make_head):
    large = random_adapter(store.general, "lora", 512, 0)
    head = make_head(store.general)
    with hmi.Engine(store, host_memory="128KiB") as engine:
        with pytest.raises(hmi.errors.InvalidAdapterError, match=r"'large' takes \d+ bytes of memory, more"):
            store.add_tenant("large", domain="words", adapter=large, head=head)
        assert "large" not in store.tenants
        small = random_adapter(store.general, "lora", 2, 0)
        store.add_tenant("small", domain="words", adapter=small, head=head)
        assert engine.run([hmi.Request("small", text="the cell")])[0].error is None
    store.add_tenant("large", domain="words", adapter=large, head=head)
    assert store.verify() == []


def poison(engine, info):
    """NaN in every parameter of a tenant where it lies in memory."""
    with engine._core.residency.holding([info]) as (resident,):
        resident.parameters.fill_(float("nan"))


@pytest.mark.parametrize("poisoned", range(len(KIND_NAMES)))
def test_nan_in_one_tenant_changes_no_bit_of_another(store, make_head, make_sentences, poisoned):
    names = add_tenants(store, 2 * len(KIND_NAMES), make_head)
    requests = requests_for([*names, *reversed(names)], make_sentences)
    with hmi.Engine(store) as engine:
        before = scores(engine.run(requests))
        poison(engine, store.tenants[names[poisoned]])
        after = scores(engine.run(requests))
    is_other = torch.tensor([request.tenant != names[poisoned] for request in requests])
    assert torch.equal(before[is_other], after[is_other])
    assert after[~is_other].isnan().all(), "the poison works"


def test_an_answer_does_not_change_with_its_neighbours(store, make_head, make_sentences):
    names = add_tenants(store, 12, make_head)
    request = requests_for(names[:1], make_sentences)[0]
    found = []
    with hmi.Engine(store) as engine:
        for seed in range(4):
            neighbours = requests_for(names[1 + 2 * seed :], make_sentences, seed=20 + seed)
            for position in (0, len(neighbours) // 2, len(neighbours)):
                batch = [*neighbours[:position], request, *neighbours[position:]]
                found.append(scores([engine.run(batch)[position]])[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-6, rtol=0)


def test_a_slot_s_next_tenant_gets_nothing_of_the_one_before(store, make_head, make_sentences):
    """A base-only tenant in the slot of an evicted one, whose blocks lay at every site."""
    full = [random_adapter(store.general, name, 4, 3, sites=kind.sites) for name, kind in KINDS.items()]
    blocks = {place: block for adapter in full for place, block in adapter.blocks.items()}
    head = make_head(store.general, pooling="cls")
    store.add_tenant("full", domain="words", adapter=hmi.Adapter(blocks), head=head)
    store.add_tenant("base", domain="words", adapter=hmi.Adapter({}), head=head)
    (request,) = requests_for(["base"], make_sentences)
    with hmi.Engine(store) as engine:
        alone = scores(engine.run([request]))
    parameters = hmi.Adapter(blocks).num_parameters + head.weight.numel() + head.bias.numel()
    room = -(-4 * parameters // 4096) * 4096  # for the one, not for both
    with hmi.Engine(store, host_memory=room) as engine:
        engine.run([replace(request, tenant="full")])
        again = scores(engine.run([request]))
        assert engine.stats().adapters["evictions"] == 1
    assert torch.equal(alone, again)
    assert Site.QUERY in {site for _, site in blocks}
