"""Several batches in flight answer as one does, and what goes wrong in a stage stays there."""

import itertools
import json
import os
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from arena_accounts import lost_bytes

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.errors import EngineFaultError, ReadTimeoutError
from hmi_engine.knowledge.adapter_kinds import KINDS
from hmi_engine.knowledge.adapters import random_adapter
from hmi_engine.pipeline.step import BatchRunner


@pytest.fixture
def fleet(store, make_head):
    """Twenty tenants of all kinds."""

    def tenant(number):
        adapter = random_adapter(store.general, list(KINDS)[number % len(KINDS)], 1 + 5 * number % 16, number)
        head = make_head(store.general, seed=number, pooling="cls")
        return hmi.NewTenant(f"t{number}", "words", adapter, replace(head, weight=head.weight / 5))

    store.add_tenants(map(tenant, range(20)))
    return [f"t{number}" for number in range(20)]


@pytest.fixture
def slow_disk():
    """Every read takes 20 ms more."""
    hmi_kernels.set_read_latency(0.02)
    yield 0.02
    hmi_kernels.set_read_latency(0.0)


def requests_of(names, make_sentences, count, seed=3):
    texts = make_sentences(count, seed=seed)
    return [hmi.Request(names[number % len(names)], text=text) for number, text in enumerate(texts)]


def scores(responses):
    assert [response.error for response in responses] == [None] * len(responses)
    return torch.tensor([list(response.scores.values()) for response in responses])


def largest_bytes(store):
    return max(info.bytes for info in store.tenants.values())


@pytest.mark.parametrize("miss", ["backoff", "exact", "budget"])
@pytest.mark.parametrize("memory", ["all", "little", "two tiers"])
def test_every_depth_gives_the_same_answers(store, fleet, make_sentences, miss, memory):
    if miss == "budget" and memory != "all":
        pytest.skip("a budget is one of a batch, and batches are smaller where more of them share the memory")
    requests = requests_of(fleet, make_sentences, 90)
    room = 6 * largest_bytes(store)
    options = {
        "all": {},
        "little": {"host_memory": room},
        "two tiers": {"device_memory": room, "host_memory": room},
    }[memory]
    answers = []
    for depth in (1, 2, 4):
        options |= {"pipeline_depth": depth, "max_batch_tokens": 60, "miss": miss}
        # What a recorder counts depends on the time that is left for it, and a budget goes by that.
        with hmi.Engine(store, record_traffic=False, **options) as engine:
            answers.append(scores(engine.run(requests)))
            assert engine.stats().batches > 5
            residency = engine._core.residency
            assert not residency._queue._waiting and not residency._users and not lost_bytes(residency)
            if memory != "all":
                assert engine.stats().adapters["evictions"] > 0
    if miss == "backoff":
        assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], atol=1e-5, rtol=0)


def test_reads_are_hidden_behind_compute(store, fleet, make_sentences, slow_disk, monkeypatch):
    """With compute as slow as a read, waiting for reads all but disappears; one at a time, it cannot."""
    compute = BatchRunner._compute

    def slow(runner, *arguments):
        time.sleep(3 * slow_disk)
        return compute(runner, *arguments)

    monkeypatch.setattr(BatchRunner, "_compute", slow)
    requests = requests_of(fleet, make_sentences, 60)
    shares = {}
    for depth in (1, 3):
        with hmi.Engine(
            store, pipeline_depth=depth, max_batch_tokens=60, host_memory=6 * largest_bytes(store)
        ) as engine:
            engine.run(requests)
            stages = engine.stats().stages
            assert stages["fetch"]["busy_seconds"] >= slow_disk * 5
            shares[depth] = engine.stats().hidden_share
    assert shares[1] == 0, "with one batch in flight everything is waited for"
    assert shares[3] > 0.5


def make_stuck(store, name):
    """In the place of a tenant's file a pipe that nobody writes to: to open it for reading never ends."""
    path = store.layout.resolve(store.tenants[name].file)
    path.unlink()
    os.mkfifo(path)
    return path


def end_stuck_read(path):
    os.close(os.open(path, os.O_WRONLY))


@pytest.mark.parametrize("tiers", [{}, {"device_memory": "1MiB"}])
def test_a_read_that_does_not_end_fails_its_tenant_alone(store, fleet, make_sentences, tiers):
    path = make_stuck(store, "t3")
    requests = requests_of(fleet, make_sentences, 40)
    with hmi.Engine(store, read_timeout=0.2, max_batch_tokens=60, **tiers) as engine:
        for _ in range(2):
            responses = engine.run(requests)
            failed = {response.tenant for response in responses if response.error is not None}
            assert failed == {"t3"}
        errors = [response.error for response in responses if response.error is not None]
        assert all(isinstance(error, ReadTimeoutError) and "'t3'" in str(error) for error in errors)
        with pytest.raises(ReadTimeoutError):
            engine.prefetch(["t3", "t4"])
        started = time.perf_counter()
        engine.run(requests)
        assert time.perf_counter() - started < 5, "known to be stuck: nobody waits for it again"
        end_stuck_read(path)


def test_a_stuck_tenant_is_served_again_when_its_read_ends(store, fleet, make_sentences):
    path = store.layout.resolve(store.tenants["t3"].file)
    content = path.read_bytes()
    make_stuck(store, "t3")
    request = hmi.Request("t3", text="the cell binds")
    with hmi.Engine(store, read_timeout=0.1) as engine:
        assert isinstance(engine.run([request])[0].error, ReadTimeoutError)
        assert isinstance(engine.run([request])[0].error, ReadTimeoutError)
        pipe = os.open(path, os.O_WRONLY)  # the read begins, and ends where the writer leaves
        path.unlink()
        path.write_bytes(content)
        os.close(pipe)
        deadline = time.monotonic() + 30
        while (response := engine.run([request])[0]).error is not None:
            assert time.monotonic() < deadline, response.error
            time.sleep(0.01)


class Interrupted(BaseException):
    """Raised as Ctrl-C's exception is, which would end pytest where it is not caught."""


class LateReads:
    """Reads that have begun and end when they are told to, and leave NaN where they read to.

    Who starts them or waits for them is interrupted, or waits for as long as is asked.
    """

    def __init__(self, destinations, interrupted=""):
        self.destinations, self.interrupted = destinations, interrupted
        self.ended = threading.Event()

    def start(self):
        if self.interrupted == "start":
            raise Interrupted

    def wait(self, timeout_seconds=None):
        if self.interrupted == "wait" and timeout_seconds:
            raise Interrupted
        return self.ended.wait(timeout_seconds)

    def outcomes(self):
        return [None if self.ended.is_set() else hmi_kernels.PendingRead(has_begun=True)] * len(
            self.destinations
        )

    def cancel(self):
        pass

    def end(self):
        for destination in self.destinations:
            destination.fill_(float("nan"))
        self.ended.set()


@pytest.fixture
def late_reads(store, monkeypatch):
    """Has the reads of a tenant's parameters be late ones from its call on; a queue of them."""
    prepare_reads = hmi_kernels.prepare_reads

    def make_late(name, **options):
        late, file = queue.SimpleQueue(), store.layout.resolve(store.tenants[name].file)

        def some_late(paths, offsets, destinations, **others):
            if file in paths and destinations[0].dtype == torch.float32:
                reads = LateReads(destinations, **options)
                late.put(reads)
                return reads
            return prepare_reads(paths, offsets, destinations, **others)

        monkeypatch.setattr(hmi_kernels, "prepare_reads", some_late)
        return late

    return make_late


@pytest.mark.parametrize("interrupted", ["", "start", "wait"])
def test_what_a_read_brings_too_late_lands_in_nobody(store, fleet, make_sentences, late_reads, interrupted):
    """Its range of the arena stays taken until the read has ended, however little room there is."""
    requests = requests_of([name for name in fleet if name != "t3"], make_sentences, 60)
    with hmi.Engine(store) as engine:
        expected = scores(engine.run(requests))
    late = late_reads("t3", interrupted=interrupted)
    room = 6 * largest_bytes(store)
    with hmi.Engine(store, read_timeout=0.1, host_memory=room, max_batch_tokens=60) as engine:
        request = hmi.Request("t3", text="the cell")
        with pytest.raises(Interrupted) if interrupted else nullcontext():
            (response,) = engine.run([request])
            assert isinstance(response.error, ReadTimeoutError)
        torch.testing.assert_close(scores(engine.run(requests)), expected, atol=1e-5, rtol=0)
        assert engine.stats().adapters["evictions"] > 0, "room was short"
        late.get_nowait().end()
        placement = engine._core.residency._placement
        assert all(placement.parameters(placed).isfinite().all() for placed in placement.all())
        torch.testing.assert_close(scores(engine.run(requests)), expected, atol=1e-5, rtol=0)
        assert len(engine._core.residency._loader._stuck) == 0, "the range is free again"


@pytest.mark.parametrize("stage", ["_search", "_compute"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_stage_that_throws_fails_its_own_batch_alone(
    store, fleet, make_sentences, monkeypatch, stage, depth, caplog
):
    original, calls = getattr(BatchRunner, stage), []

    def third_fails(runner, *arguments):
        calls.append(None)
        if len(calls) == 3:
            raise ZeroDivisionError("on purpose")
        return original(runner, *arguments)

    requests = requests_of(fleet, make_sentences, 60)
    with hmi.Engine(store, max_batch_tokens=60, pipeline_depth=depth) as engine:
        expected = engine.run(requests)
        with monkeypatch.context() as patched:
            patched.setattr(BatchRunner, stage, third_fails)
            responses = engine.run(requests)
        failed = [response for response in responses if response.error is not None]
        assert 0 < len(failed) < len(responses) / 2
        assert all(isinstance(response.error, EngineFaultError) for response in failed)
        assert "on purpose" in str(failed[0].error) and "on purpose" in caplog.text
        for response, wanted in zip(responses, expected, strict=True):
            assert response.error is not None or response.scores == pytest.approx(wanted.scores, abs=1e-5)
        assert not engine._core.residency._users, "nothing stays held"
        scores(engine.run(requests))


def test_what_is_asked_for_while_a_read_goes_on_does_not_wait(store, fleet, late_reads):
    """Statistics, and tenants that are there, are not behind a read of another."""
    late = late_reads("t3")
    request = hmi.Request("t1", text="the cell")
    with hmi.Engine(store, read_timeout=20) as engine, ThreadPoolExecutor(1) as other:
        expected = scores(engine.run([request]))
        reading = other.submit(engine.prefetch, ["t3"])
        reads = late.get(timeout=20)
        assert engine._core.residency.num_resident == 1
        assert engine._core.residency.statistics.loads == 1
        engine._core.residency.expect([[store.tenants["t1"]]])
        assert torch.equal(scores(engine.run([request])), expected)
        assert not reading.done(), "it was not waited for"
        reads.end()
        assert reading.result() == 1


def test_the_trace_shows_stages_and_layers(store, fleet, make_sentences, tmp_path):
    path = tmp_path / "trace.json"
    with hmi.Engine(store, max_batch_tokens=60, trace=path) as engine:
        engine.run(requests_of(fleet, make_sentences, 40))
        batches = engine.stats().batches
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    counts = {name: sum(event["name"] == name for event in events) for name in {e["name"] for e in events}}
    upper = store.general.num_layers - store.general.plot_layers
    expected = dict.fromkeys(("fetch", "search", "compute", "respond"), batches)
    expected |= {f"layer {store.general.plot_layers + number}": batches for number in range(upper)}
    assert counts == expected | {"tokenise": 1}
    for event in events:
        assert event["ts"] >= 0 and event["dur"] >= 0 and event["pid"] == os.getpid()
    spans = {(e["name"], e["args"]["batch"]): (e["ts"], e["ts"] + e["dur"]) for e in events if e["args"]}
    for number in range(1, batches + 1):
        order = [spans[stage, number] for stage in ("fetch", "search", "compute")]
        assert all(before[1] <= after[0] + 1 for before, after in itertools.pairwise(order))


def test_a_trace_that_cannot_be_written_is_an_error_of_ours(store, tmp_path):
    engine = hmi.Engine(store, trace=tmp_path / "file" / "trace.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(hmi.HmiError, match=r"trace\.json"):
        engine.close()
    engine.close()


@pytest.mark.parametrize(
    "options", [{"pipeline_depth": 0}, {"pipeline_depth": 9}, {"read_timeout": 0}, {"no_such": 1}]
)
def test_options_are_checked(store, options):
    with pytest.raises((ValueError, TypeError), match=next(iter(options))):
        hmi.Engine(store, **options)
