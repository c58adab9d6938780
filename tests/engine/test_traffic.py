"""Engines count what their traffic asks for; domains learn from it while requests are answered."""

import itertools
import threading
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import sentences

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.errors import ReadOnlyStoreError, StoreBusyError, StoreFullError
from hmi_engine.knowledge.plot_table import open_plot
from hmi_engine.knowledge.traffic_file import read_traffic
from hmi_engine.pipeline import traffic_saver

DEADLINE_SECONDS = 30
TOPIC = sentences(40, seed=3, longest=12)


@pytest.fixture
def learning_store(tiny_bert, tmp_path, make_head):
    """A store whose domain ``words`` holds next to nothing, with one tenant ``t``."""
    with hmi.Store.create(
        tmp_path / "learning", general=tiny_bert, plot_layers=2, row_dtype="float32"
    ) as store:
        store.add_domain("words", ["the cell"], min_count=1, plot_bytes="1MiB")
        store.add_tenant("t", domain="words", adapter=hmi.Adapter({}), head=make_head(store.general))
        yield store


def requests(texts):
    return [hmi.Request("t", text=text) for text in texts]


def scores(responses):
    assert all(response.error is None for response in responses), responses
    return np.array([list(response.scores.values()) for response in responses])


def saved(store):
    files = store.catalog.traffic_files()
    return [read_traffic(store.layout.resolve(file.file)) for file in files]


def bigrams(store, texts):
    """What a Counter makes of the texts' bigrams, by key, and the number of tokens."""
    ids = [encoded.input_ids for encoded in store.encoder.encode(texts)]
    counter = Counter(pair for sequence in ids for pair in itertools.pairwise(sequence))
    keys = hmi_kernels.ngram_keys(torch.tensor([[*pair, -1] for pair in counter], dtype=torch.int32))
    counts = dict(zip(keys.tolist(), counter.values(), strict=True))
    return counts, sum(map(len, ids))


def wait_until(is_reached):
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not is_reached():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


@pytest.mark.parametrize("miss", ["backoff", "exact"])
def test_what_was_asked_for_is_saved_when_the_engine_closes(learning_store, miss):
    expected, num_tokens = bigrams(learning_store, TOPIC)
    engine = hmi.Engine(learning_store, miss=miss)
    engine.run(requests(TOPIC * 2))  # one batch: the first is always counted whole
    assert learning_store.catalog.traffic_files() == []
    engine.close()
    engine.close()
    (counts,) = saved(learning_store)
    assert counts.tokens == 2 * num_tokens
    assert counts.windows == 2 * (num_tokens - len(TOPIC))
    weights = dict(zip(counts.keys.tolist(), counts.weights.tolist(), strict=True))
    assert weights == {key: 2 * count for key, count in expected.items()}
    held = expected.keys() & known_keys(learning_store)
    assert counts.hits == 2 * sum(expected[key] for key in held)


def test_rows_computed_in_traffic_are_no_hits_of_the_table(learning_store):
    with hmi.Engine(learning_store, miss="exact") as engine:
        for _ in range(2):
            engine.run(requests(TOPIC))
        assert engine.stats().plot["window_hits"] > engine.stats().plot["windows"] / 2
    (counts,) = saved(learning_store)
    assert counts.hits < counts.windows / 10


def known_keys(store):
    files = [info.file for info in store.domains.values() if info.file]
    tables = [open_plot(store.layout.resolve(file), store.general) for file in files]
    return {key for table in tables for key in table.row_keys.tolist()}


def test_traffic_is_saved_while_the_engine_is_open(learning_store):
    with hmi.Engine(learning_store, traffic_interval=0) as engine:
        engine.run(requests(TOPIC))
        wait_until(lambda: engine.stats().traffic["saved_tokens"])
        assert sum(counts.tokens for counts in saved(learning_store)) == engine.stats().tokens
    assert len(saved(learning_store)) == 1, "nothing came after it"


def test_nothing_is_recorded_where_nobody_wants_it_or_nobody_asked(learning_store, tiny_bert, tmp_path):
    with hmi.Engine(learning_store, record_traffic=False) as engine:
        engine.run(requests(TOPIC))
        assert engine.stats().traffic is None
    hmi.Engine(learning_store).close()
    with (
        hmi.Store.open(learning_store.layout.root, read_only=True) as store,
        hmi.Engine(store) as engine,
    ):
        engine.run(requests(TOPIC))
    with hmi.Store.create(tmp_path / "plain", general=tiny_bert, plot_layers=0) as store:
        hmi.Engine(store, update_domains_every=60).close()
    assert learning_store.catalog.traffic_files() == []


def test_a_domain_removed_meanwhile_is_forgotten_quietly(learning_store, make_head):
    learning_store.add_domain("gone", ["a drug"], min_count=1)
    learning_store.add_tenant(
        "g", domain="gone", adapter=hmi.Adapter({}), head=make_head(learning_store.general)
    )
    with hmi.Engine(learning_store) as engine, warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run([hmi.Request("g", text=TOPIC[0]), hmi.Request("t", text=TOPIC[0])])
        learning_store.remove_tenant("g")
        learning_store.remove_domain("gone")
        engine.close()
        assert engine.stats().traffic["dropped_tokens"] == engine.stats().traffic["saved_tokens"] > 0
    (file,) = learning_store.catalog.traffic_files()
    assert file.domain_id == learning_store.domains["words"].id


def test_a_full_disk_is_told_once_and_fails_no_request(learning_store, monkeypatch):
    def fail(*_):
        raise StoreFullError("no room")

    monkeypatch.setattr(learning_store, "save_traffic", fail)
    engine = hmi.Engine(learning_store, update_domains_every=0.01)
    with pytest.warns(RuntimeWarning, match="no room") as told:
        for round_number in range(1, 3):
            scores(engine.run(requests(TOPIC)))
            wait_until(lambda least=round_number: engine.stats().traffic["errors"] >= least)
        engine.close()
    assert len(told) == 1
    assert engine.stats().traffic["last_error"] == "no room"


def test_a_store_that_nobody_updates_keeps_a_bounded_number_of_files(learning_store, monkeypatch):
    monkeypatch.setattr(traffic_saver, "MOST_WAITING_FILES", 2)
    for number in range(4):
        with hmi.Engine(learning_store) as engine:
            engine.run(requests(TOPIC[:5]))
        traffic = engine.stats().traffic
        assert bool(traffic["saved_tokens"]) == (number < 2)
        assert bool(traffic["dropped_tokens"]) == (number >= 2)
    assert len(saved(learning_store)) == 2
    assert learning_store.update_domain("words").traffic_tokens == 2 * traffic["dropped_tokens"]


def test_many_domains_in_little_memory_lose_nothing(learning_store, make_head):
    for number in range(6):  # 256 KiB hold the counts of four
        learning_store.add_domain(f"d{number}", ["a drug"], min_count=1)
        head = make_head(learning_store.general)
        learning_store.add_tenant(f"t{number}", domain=f"d{number}", adapter=hmi.Adapter({}), head=head)
    with hmi.Engine(learning_store, traffic_memory="256KiB") as engine:
        for text in TOPIC[:4]:
            for number in range(6):
                engine.run([hmi.Request(f"t{number}", text=text)])
    assert sum(counts.tokens for counts in saved(learning_store)) == engine.stats().tokens
    assert engine.stats().traffic["dropped_tokens"] == 0


def test_hits_rise_where_the_engine_updates_its_domains(learning_store):
    with hmi.Engine(learning_store, update_domains_every=0.05, update_share=1) as engine:
        engine.run(requests(TOPIC * 2))
        before = engine.stats().plot
        wait_until(lambda: engine.stats().updates["updates"])
        engine.run(requests(TOPIC * 2))
        after = engine.stats().plot
        assert engine.stats().updates["promoted"] > 0
        assert engine.stats().updates["errors"] == 0
    windows = before["windows"]
    assert before["window_hits"] < 0.1 * windows
    assert after["window_hits"] - before["window_hits"] == windows, "the budget suffices for all"
    assert learning_store.verify() == []


@pytest.mark.parametrize("budget", ["1MiB", "8KiB"])
def test_exact_answers_stay_while_rows_come_and_go(learning_store, held_out, budget):
    """Readers that saw half an update would find a wrong row, or none where one was promised."""
    learning_store.update_domain("words", ["the protein binds"], plot_bytes=budget)
    texts = {name: sentences(12, seed=seed) for name, seed in (("a", 5), ("b", 6))} | {"c": held_out}
    options = {"miss": "exact", "overlay_memory": 0}
    with hmi.Engine(learning_store, record_traffic=False, **options) as engine:
        expected = {name: scores(engine.run(requests(part))) for name, part in texts.items()}
    generations = set()
    engine = hmi.Engine(learning_store, update_domains_every=0.01, **options)
    with engine:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while engine.stats().updates["updates"] < 4:
            assert time.monotonic() < deadline, engine.stats().updates
            for name, part in texts.items():
                np.testing.assert_allclose(scores(engine.run(requests(part))), expected[name], atol=1e-4)
            generations.add(learning_store.domains["words"].generation)
    assert len(generations) > 1
    assert learning_store.verify() == []


def test_closing_gives_up_an_update_under_way(learning_store, monkeypatch):
    """The thread sleeps for hours after the first rows; closing must not wait for that."""
    working = threading.Event()
    update_domain = learning_store.update_domain

    def update_slowly(name, *, progress):
        def told(step, done, total):
            working.set()
            time.sleep(0.01)
            progress(step, done, total)

        return update_domain(name, progress=told)

    monkeypatch.setattr(learning_store, "update_domain", update_slowly)
    before = learning_store.domains["words"]
    engine = hmi.Engine(learning_store, update_domains_every=0.01, update_share=1e-9)
    engine.run(requests(TOPIC))
    assert working.wait(DEADLINE_SECONDS)
    engine.close()
    assert "hmi-domain-updates" not in {thread.name for thread in threading.enumerate()}
    assert learning_store.domains["words"] == before
    assert learning_store.verify() == []
    assert learning_store.catalog.traffic_files() != [], "it waits for the next update"


def test_failing_updates_are_told_once_and_busy_ones_wait(learning_store, monkeypatch):
    errors = [StoreBusyError("busy"), MemoryError("too big"), MemoryError("too big")]

    def fail(name, **_):
        raise errors.pop(0) if len(errors) > 1 else errors[0]

    monkeypatch.setattr(learning_store, "update_domain", fail)
    with pytest.warns(RuntimeWarning, match="too big") as told:
        engine = hmi.Engine(learning_store, update_domains_every=0.01)
        engine.run(requests(TOPIC))
        wait_until(lambda: engine.stats().updates["errors"] >= 2)
        engine.close()
    assert len(told) == 1
    assert engine.stats().updates["postponed"] == 1
    assert engine.stats().updates["last_error"] == "MemoryError: too big"


@pytest.mark.parametrize(
    "options",
    [
        {"traffic_interval": -1},
        {"traffic_memory": "1KiB"},
        {"update_domains_every": 0},
        {"update_domains_every": 1, "update_share": 0},
    ],
)
def test_impossible_options_are_refused(learning_store, options):
    with pytest.raises(ValueError, match="must be"):
        hmi.Engine(learning_store, **options)


def test_updates_need_a_store_open_for_writing(learning_store):
    with (
        hmi.Store.open(learning_store.layout.root, read_only=True) as store,
        pytest.raises(ReadOnlyStoreError, match="update_domains_every"),
    ):
        hmi.Engine(store, update_domains_every=1)
