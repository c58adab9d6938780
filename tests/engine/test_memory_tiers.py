"""An engine's memory: two tiers answer as one, budgets are kept, weights change under running requests."""

import itertools
import threading
from dataclasses import replace

import pytest
import torch

import hmi_engine as hmi
from hmi_engine.errors import EngineClosedError, InvalidSizeError, OverloadedError, UnknownTenantError
from hmi_engine.knowledge.adapter_kinds import KINDS
from hmi_engine.knowledge.adapters import random_adapter
from hmi_engine.pipeline.step import BatchRunner


@pytest.fixture
def fleet(store, make_head):
    """Thirty tenants of all kinds, ranks 1 to 24."""

    def tenant(number):
        kind = list(KINDS)[number % len(KINDS)]
        adapter = random_adapter(store.general, kind, 1 + 7 * number % 24, number)
        return hmi.NewTenant(f"t{number}", "words", adapter, soft_head(store, make_head, number))

    store.add_tenants(map(tenant, range(30)))
    return [f"t{number}" for number in range(30)]


def soft_head(store, make_head, seed):
    head = make_head(store.general, seed=seed, pooling="cls")
    return replace(head, weight=head.weight / 5)  # probabilities near 0 and 1 would hide differences


def scores(responses):
    assert [response.error for response in responses] == [None] * len(responses)
    return torch.tensor([list(response.scores.values()) for response in responses])


def mixed(names, make_sentences, count, seed=3):
    numbers = torch.randint(0, len(names), (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = make_sentences(count, seed=seed)
    return [hmi.Request(names[number], text=text) for number, text in zip(numbers, texts, strict=True)]


def test_two_tiers_answer_as_one(store, fleet, make_sentences):
    requests = mixed(fleet, make_sentences, 120)
    largest = max(info.bytes for info in store.tenants.values())
    total = sum(info.bytes for info in store.tenants.values())
    with hmi.Engine(store) as engine:
        expected = scores(engine.run(requests))
    for device_memory, host_memory in itertools.product(
        (3 * largest, total // 2, 4 * total), (2 * largest, 4 * total)
    ):
        with hmi.Engine(
            store, device_memory=device_memory, host_memory=host_memory, max_batch_tokens=128
        ) as engine:
            for _ in range(2):
                torch.testing.assert_close(scores(engine.run(requests)), expected, atol=1e-4, rtol=0)
            statistics = engine.stats()
        assert statistics.resident_bytes <= device_memory
        assert statistics.host_adapters["reserved_bytes"] <= host_memory
        assert (statistics.adapters["evictions"] > 0) == (device_memory < total)
        assert (statistics.host_adapters["evictions"] > 0) == (host_memory < total)
        if host_memory > total:
            assert statistics.adapters["files_read"] == len({request.tenant for request in requests})


def test_the_queue_is_known_from_the_start(store, fleet, make_sentences):
    """Batches ask for one tenant each, in turn: who knows the queue keeps half of them all the time."""
    largest = max(info.bytes for info in store.tenants.values())
    names = sorted(fleet, key=lambda name: store.tenants[name].bytes)[-8:]
    requests = [hmi.Request(name, text="the cell binds") for name in names * 10]
    counts = {}
    for known in (True, False):
        with hmi.Engine(
            store, host_memory=4 * largest + 8 * 4096, max_batch_tokens=1, pipeline_depth=1
        ) as engine:
            if known:
                engine.run(requests)
            else:
                for request in requests:
                    engine.run([request])
            counts[known] = engine.stats().adapters["misses"]
    assert counts[True] < 0.75 * len(requests)
    assert counts[True] < counts[False]


def test_statistics_add_up(store, fleet, make_sentences):
    total = sum(info.bytes for info in store.tenants.values())
    for options in ({"host_memory": total // 3}, {"device_memory": total // 3, "host_memory": total // 2}):
        with hmi.Engine(store, max_batch_tokens=64, **options) as engine:
            assert engine.prefetch(fleet[:3]) == 3
            engine.run(mixed(fleet, make_sentences, 80))
            statistics = engine.stats()
        arena, host = statistics.adapters, statistics.host_adapters
        assert arena["loads"] == arena["misses"] > 0 and arena["hits"] > 0
        assert arena["loads"] - arena["evictions"] - arena["retired"] == statistics.resident_tenants
        if "device_memory" not in options:
            assert host is None and arena["bytes_copied"] == 0 and arena["files_read"] == arena["loads"]
        else:
            assert host["misses"] == arena["files_read"] and host["hits"] + host["misses"] == arena["misses"]
            assert arena["bytes_copied"] >= arena["bytes_read"] > 0
            assert host["misses"] - host["evictions"] == host["resident_tenants"]


def test_pinned_tenants_are_there_from_the_start_and_stay(store, fleet, make_sentences):
    pinned = fleet[3:6]
    for name in pinned:
        store.pin_tenant(name)
    total = sum(info.bytes for info in store.tenants.values())
    with hmi.Engine(store, host_memory=total // 3, max_batch_tokens=64) as engine:
        assert engine.stats().resident_tenants == 3
        before = engine.stats().adapters["loads"]
        scores(engine.run(mixed([name for name in fleet if name not in pinned], make_sentences, 80)))
        engine.run([hmi.Request(name, text="the cell") for name in pinned])
        assert engine.stats().adapters["hits"] >= 3
        assert {p.info.name for p in engine._core.residency._placement.all()} >= set(pinned)
        assert engine.stats().adapters["loads"] > before
    for name in fleet:
        store.pin_tenant(name)
    with pytest.raises(OverloadedError, match="30 pinned tenants need"):
        hmi.Engine(store, host_memory=total // 3)
    with pytest.raises(OverloadedError, match="device_memory"):
        hmi.Engine(store, device_memory=total // 3)


@pytest.mark.parametrize("options", [{}, {"device_memory": "1MiB"}], ids=["one_tier", "two_tiers"])
def test_weights_replaced_while_requests_run(store, fleet, make_head, options):
    """Every answer is wholly one generation's; the memory of those before is given back."""
    name, text = fleet[0], "the protein binds a cell"
    generations = []

    def put(seed):
        kind = list(KINDS)[seed % len(KINDS)]
        adapter = random_adapter(store.general, kind, 1 + seed, 100 + seed)
        head = soft_head(store, make_head, 100 + seed)
        # Labels of its own, so that an answer says which head it is from.
        labels = tuple(f"{seed}-{label}" for label in head.labels)
        store.add_tenant(
            name, domain="words", adapter=adapter, head=replace(head, labels=labels), replace=True
        )
        with hmi.Engine(store) as fresh:
            generations.append(fresh.run([hmi.Request(name, text=text)])[0].scores)

    put(0)
    answers, stop = [], threading.Event()
    with hmi.Engine(store, max_batch_tokens=32, **options) as engine:

        def keep_asking():
            while not stop.is_set():
                answers.extend(engine.run([hmi.Request(each, text=text) for each in [name, *fleet[1:4]] * 4]))

        thread = threading.Thread(target=keep_asking)
        thread.start()
        for seed in range(1, 9):
            put(seed)
        stop.set()
        thread.join()
        (last,) = engine.run([hmi.Request(name, text=text)])
        assert engine.stats().resident_tenants == 4
    seen = set()
    for response in [*answers, last]:
        assert response.error is None, response.error
        if response.tenant != name:
            continue
        number = int(next(iter(response.scores)).split("-")[0])
        seen.add(number)
        assert response.scores == pytest.approx(generations[number], abs=1e-5)
    assert int(next(iter(last.scores)).split("-")[0]) == 8
    assert len(seen) > 2


def test_replaced_by_another_domain_and_head_between_admission_and_loading(
    store, make_head, make_sentences, monkeypatch
):
    """Wholly the new one: its domain's rows, its weights, its kind of answer."""
    store.add_domain("other", make_sentences(200, seed=40))
    store.add_tenant("t", domain="words", adapter=hmi.Adapter({}), head=soft_head(store, make_head, 1))
    tags = hmi.TokenClassificationHead(
        labels=("a", "b"), weight=torch.randn(2, store.general.hidden_size) / 5, bias=torch.zeros(2)
    )
    adapter = random_adapter(store.general, "lora", 4, 3)
    request = hmi.Request("t", text=make_sentences(1, seed=41)[0])
    prepare = BatchRunner.prepare

    def replace_first(runner, items):
        if store.tenants["t"].domain == "words":
            store.add_tenant("t", domain="other", adapter=adapter, head=tags, replace=True)
        return prepare(runner, items)

    with monkeypatch.context() as patched, hmi.Engine(store) as engine:
        patched.setattr(BatchRunner, "prepare", replace_first)
        (raced,) = engine.run([request])
    with hmi.Engine(store) as engine:
        (expected,) = engine.run([request])
    assert raced.error is None and raced.kind == "token_classification"
    assert [(tag.start, tag.end, tag.label) for tag in raced.tags] == [
        (tag.start, tag.end, tag.label) for tag in expected.tags
    ]
    assert [tag.score for tag in raced.tags] == pytest.approx([tag.score for tag in expected.tags], abs=1e-6)


def test_removed_between_admission_and_loading(store, fleet, monkeypatch):
    prepare = BatchRunner.prepare

    def remove_first(runner, items):
        if "t0" in store.tenants:
            store.remove_tenant("t0")
        return prepare(runner, items)

    monkeypatch.setattr(BatchRunner, "prepare", remove_first)
    with hmi.Engine(store) as engine:
        gone, there = engine.run([hmi.Request("t0", text="a cell"), hmi.Request("t1", text="a cell")])
    assert isinstance(gone.error, UnknownTenantError) and "removed while" in str(gone.error)
    assert there.error is None


def test_prefetch_beside_running_requests(store, fleet, make_sentences):
    """From other threads, without waiting for a run, and without harm to one."""
    requests = mixed(fleet, make_sentences, 60)
    with hmi.Engine(store) as engine:
        expected = scores(engine.run(requests))
    total = sum(info.bytes for info in store.tenants.values())
    with hmi.Engine(store, host_memory=total // 3, max_batch_tokens=64) as engine:
        stop = threading.Event()
        failures = []

        def prefetch(seed):
            for name in itertools.cycle(fleet[seed:] + fleet[:seed]):
                if stop.is_set():
                    return
                try:
                    engine.prefetch([name])
                except Exception as error:
                    failures.append(error)
                    return

        threads = [threading.Thread(target=prefetch, args=(7 * number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            torch.testing.assert_close(scores(engine.run(requests)), expected, atol=1e-4, rtol=0)
        stop.set()
        for thread in threads:
            thread.join()
        assert not failures
    with pytest.raises(EngineClosedError):
        engine.prefetch(fleet[:1])
    assert engine._core.residency.arena.memory.nbytes == 0, "memory was given back"


def test_an_error_in_a_batch_leaves_nobody_waiting(store, fleet, monkeypatch):
    def fail(runner, items):
        raise RuntimeError("on purpose")

    with hmi.Engine(store, max_batch_tokens=8) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(BatchRunner, "prepare", fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                engine.run([hmi.Request(name, text="the cell") for name in fleet])
        assert not engine._core.residency._queue._waiting


@pytest.mark.parametrize("size", ["many", -1, 1.5, None])
def test_device_memory_out_of_range(store, size):
    with pytest.raises(InvalidSizeError):
        hmi.Engine(store, device_memory=size)
