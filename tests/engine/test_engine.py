"""What users of the engine rely on: order, isolation, bad input, change under way, bounded memory."""

import dataclasses
import itertools
import threading
import warnings

import numpy as np
import pytest
import torch

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.errors import (
    EngineClosedError,
    InvalidRequestError,
    MissPolicyWarning,
    OverloadedError,
    StoreCorruptError,
    TextTooLongError,
    UnknownTenantError,
)
from hmi_engine.knowledge.adapters import Site

KINDS = ("bottleneck", "lora")


def fill(store, make_head, count, *, poolings=("pooler", "cls", "mean")):
    """Adds tenants of mixed kinds and ranks, every fifth with a head alone."""
    for number in range(count):
        rank = (1, 3, 8, 16)[number % 4]
        adapter = hmi.random_adapter(store.general, KINDS[number % 2], rank, number)
        if number % 5 == 4:
            adapter = hmi.Adapter({})
        head = make_head(store.general, pooling=poolings[number % len(poolings)], seed=number)
        store.add_tenant(f"t{number}", domain="words", adapter=adapter, head=head)


def scores(response):
    assert response.error is None, response.error
    return np.array(list(response.scores.values()))


@pytest.mark.parametrize("miss", ["backoff", "exact"])
def test_mixed_batch_equals_one_request_at_a_time(store, make_head, make_sentences, miss):
    fill(store, make_head, 20)
    requests = [
        hmi.Request(f"t{number * 7 % 20}", text=text)
        for number, text in enumerate(make_sentences(60, seed=5))
    ]
    together = hmi.Engine(store, miss=miss).run(requests)
    alone = hmi.Engine(store, miss=miss)
    for request, response in zip(requests, together, strict=True):
        assert response.tenant == request.tenant
        np.testing.assert_allclose(scores(response), scores(alone.run([request])[0]), atol=1e-4)


def test_small_batches_small_memory_and_reference_kernels_change_nothing(store, make_head, make_sentences):
    fill(store, make_head, 12)
    requests = [hmi.Request(f"t{i % 12}", text=text) for i, text in enumerate(make_sentences(40, seed=6))]
    expected = hmi.Engine(store).run(requests)
    largest = max(info.bytes for info in store.tenants.values())
    for options in (
        {"max_batch_tokens": 1},
        {"max_batch_tokens": 64},
        {"host_memory": 4 * (largest + 4096)},
        {"backend": "reference"},
    ):
        engine = hmi.Engine(store, **options)
        for first, second in zip(expected, engine.run(requests), strict=True):
            np.testing.assert_allclose(scores(first), scores(second), atol=1e-4)
        if "host_memory" in options:
            assert engine.stats().adapters["evictions"] > 0


def test_exact_mode_does_not_depend_on_the_table(tiny_bert, tmp_path, corpus, held_out, make_head):
    found = []
    for number, texts in enumerate((corpus, corpus[:5])):
        with hmi.Store.create(
            tmp_path / f"store{number}", general=tiny_bert, plot_layers=2, row_dtype="float32"
        ) as store:
            store.add_domain("words", texts)
            fill(store, make_head, 3)
            engine = hmi.Engine(store, miss="exact")
            requests = [hmi.Request("t1", text=text) for text in held_out]
            found += [list(map(scores, engine.run(requests))) for _ in range(2)]  # 2: out of the overlay
            assert engine.stats().plot["windows_computed"] > 0
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, atol=1e-4)


def test_exact_mode_with_a_tiny_overlay(store, make_head, make_sentences):
    fill(store, make_head, 3)
    requests = [hmi.Request("t1", text=text) for text in make_sentences(50, seed=9)]
    expected = hmi.Engine(store, miss="exact").run(requests)
    row_bytes = 2 * 32 * 2
    engine = hmi.Engine(store, miss="exact", overlay_memory=2 * 64 * row_bytes)
    for first, second in zip(expected, engine.run(requests), strict=True):
        np.testing.assert_allclose(scores(first), scores(second), atol=1e-3)


def test_errors_stay_with_their_request(store, make_head):
    fill(store, make_head, 2)
    requests = [
        hmi.Request("t0", text="the cell"),
        hmi.Request("nobody", text="the cell"),
        hmi.Request("t1", text=""),
        hmi.Request("t1", text="   \n"),
        hmi.Request("t1"),
        hmi.Request("t1", text="a", input_ids=[1]),
        hmi.Request("t1", input_ids=[]),
        hmi.Request("t1", input_ids=[5, 10**6]),
        hmi.Request("t1", input_ids=[5, -1]),
        hmi.Request("t1", input_ids=[5, "x"]),
        hmi.Request("t1", text=b"bytes"),
        hmi.Request("../etc/passwd", text="a"),
        hmi.Request("", text="a"),
        hmi.Request("t1", text="the cell", long_text="ask"),
        hmi.Request("t1", text="the cell", id=7),
    ]
    responses = hmi.Engine(store).run(requests)
    expected = [None, UnknownTenantError, *[InvalidRequestError] * 9, UnknownTenantError, InvalidRequestError]
    expected += [InvalidRequestError, None]
    for response, kind in zip(responses, expected, strict=True):
        assert (response.error is None) if kind is None else isinstance(response.error, kind), response
    assert "'t0'" in str(responses[1].error) or "tenant list" in str(responses[1].error)
    assert responses[-1].id == 7
    assert responses[1].to_dictionary()["error"]["type"] == "UnknownTenantError"
    assert hmi.Engine(store).run([]) == []


def test_long_text_is_cut_with_a_flag_or_refused(store, make_head):
    fill(store, make_head, 1)
    text = "the cell " * 100
    cut, refused = hmi.Engine(store).run(
        [hmi.Request("t0", text=text), hmi.Request("t0", text=text, long_text="error")]
    )
    assert cut.usage.truncated and cut.usage.tokens == store.general.max_positions
    assert isinstance(refused.error, TextTooLongError)
    ids = list(range(5, 10)) * 40
    (response,) = hmi.Engine(store).run([hmi.Request("t0", input_ids=ids)])
    assert response.usage.truncated and response.usage.tokens == store.general.max_positions


def test_input_ids_equal_text(store, make_head):
    fill(store, make_head, 1)
    text = "results show increase of the protein"
    first, second = hmi.Engine(store).run(
        [hmi.Request("t0", text=text), hmi.Request("t0", input_ids=store.encoder.token_ids([text])[0])]
    )
    np.testing.assert_array_equal(scores(first), scores(second))


def test_multi_label_probabilities_are_independent(store, make_head):
    head = dataclasses.replace(make_head(store.general), multi_label=True)
    store.add_tenant("multi", domain="words", adapter=hmi.Adapter({}), head=head)
    store.add_tenant("single", domain="words", adapter=hmi.Adapter({}), head=make_head(store.general))
    multi, single = hmi.Engine(store).run(
        [hmi.Request("multi", text="the cell"), hmi.Request("single", text="the cell")]
    )
    logits = np.log(scores(multi) / (1 - scores(multi)))
    np.testing.assert_allclose(scores(single), np.exp(logits) / np.exp(logits).sum(), atol=1e-4)
    assert multi.label is None and single.label == max(single.scores, key=single.scores.get)


def test_nan_in_one_slot_changes_no_other_response_by_a_bit(store, make_head, held_out):
    fill(store, make_head, 6)
    requests = [hmi.Request(f"t{i % 6}", text=text) for i, text in enumerate(held_out)]
    engine = hmi.Engine(store)
    before = engine.run(requests)
    with engine._core.residency.holding([store.tenants["t1"]]) as (tenant,):
        tenant.parameters.fill_(float("nan"))
    for request, first, second in zip(requests, before, engine.run(requests), strict=True):
        if request.tenant == "t1":
            assert np.isnan(scores(second)).all()
        else:
            np.testing.assert_array_equal(scores(first), scores(second))


def test_name_reloaded_with_other_weights_is_not_served_from_memory(store, make_head):
    """vllm 42125: a cache keyed by name answers with the old weights."""
    fill(store, make_head, 2)
    engine = hmi.Engine(store)
    request = hmi.Request("t0", text="the protein binds")
    (old,) = engine.run([request])
    head = make_head(store.general, seed=99)
    store.add_tenant("t0", domain="words", adapter=hmi.Adapter({}), head=head, replace=True)
    (new,) = engine.run([request])
    (fresh,) = hmi.Engine(store).run([request])
    np.testing.assert_array_equal(scores(new), scores(fresh))
    assert not np.allclose(scores(new), scores(old))


def test_evicted_slot_leaks_nothing_to_the_next_tenant(store, make_head, held_out):
    """sglang 8103: a module that the next adapter lacks must not be the evicted one's."""
    general = store.general
    everything = hmi.random_adapter(general, "lora", 8, 1, sites=[Site.QUERY, Site.FFN_UP, Site.FFN_DOWN])
    loud = {
        place: hmi.LoraBlock(block.a * 50, block.b * 50, 1.0) for place, block in everything.blocks.items()
    }
    store.add_tenant("loud", domain="words", adapter=hmi.Adapter(loud), head=make_head(general))
    store.add_tenant("quiet", domain="words", adapter=hmi.Adapter({}), head=make_head(general))
    size = store.tenants["loud"].bytes + 4096
    engine = hmi.Engine(store, host_memory=size)
    requests = [hmi.Request("quiet", text=text) for text in held_out]
    expected = hmi.Engine(store).run(requests)
    for _ in range(3):
        engine.run([hmi.Request("loud", text="the cell")])
        for first, second in zip(expected, engine.run(requests), strict=True):
            np.testing.assert_allclose(scores(first), scores(second), atol=1e-6)
    assert engine.stats().adapters["evictions"] >= 3


def test_removed_tenant(store, make_head):
    fill(store, make_head, 2)
    engine = hmi.Engine(store)
    engine.prefetch(["t0", "t1"])
    assert engine.stats().resident_tenants == 2
    store.remove_tenant("t0")
    gone, there = engine.run([hmi.Request("t0", text="a"), hmi.Request("t1", text="a")])
    assert isinstance(gone.error, UnknownTenantError) and there.error is None


def test_damaged_tenant_file_fails_alone(store, make_head):
    fill(store, make_head, 3)
    path = store.layout.resolve(store.tenants["t1"].file)
    path.write_bytes(path.read_bytes()[:-64])
    responses = hmi.Engine(store).run([hmi.Request(f"t{i}", text="the cell") for i in range(3)])
    assert isinstance(responses[1].error, StoreCorruptError)
    assert responses[0].error is None and responses[2].error is None
    with pytest.raises(StoreCorruptError):
        hmi.Engine(store).prefetch(["t1"])


def test_tenant_larger_than_all_memory(store, make_head):
    fill(store, make_head, 4)
    (response,) = hmi.Engine(store, host_memory=4096).run([hmi.Request("t3", text="the cell")])
    assert isinstance(response.error, OverloadedError)
    assert "host_memory" in str(response.error)


def test_more_tenants_than_memory_and_than_first_slots(store, make_head):
    fill(store, make_head, 150)
    requests = [hmi.Request(f"t{i}", text="the protein binds a cell") for i in range(150)]
    expected = hmi.Engine(store).run(requests)
    tight = hmi.Engine(store, host_memory=60_000)
    for _ in range(2):
        for first, second in zip(expected, tight.run(requests), strict=True):
            np.testing.assert_allclose(scores(first), scores(second), atol=1e-5)
    statistics = tight.stats()
    assert statistics.resident_bytes <= 60_000 and statistics.adapters["evictions"] > 100


def test_calls_from_many_threads_take_turns(store, make_head, held_out):
    fill(store, make_head, 4)
    engine = hmi.Engine(store)
    requests = [hmi.Request(f"t{i % 4}", text=text) for i, text in enumerate(held_out)]
    expected = engine.run(requests)
    results = []
    threads = [threading.Thread(target=lambda: results.append(engine.run(requests))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    for result in results:
        for first, second in zip(expected, result, strict=True):
            np.testing.assert_array_equal(scores(first), scores(second))


def test_statistics_count_windows_as_a_plain_count_does(store, make_head, held_out):
    fill(store, make_head, 2)
    engine = hmi.Engine(store)
    engine.run([hmi.Request("t0", text=text) for text in held_out])
    ids = store.encoder.token_ids(held_out)
    rows = hmi_kernels.ngram_tokens(engine._core.plots.reading(["words"]).table("words").row_keys).tolist()
    kept = {tuple(row[:2]) for row in rows}
    bigrams = [pair for sequence in ids for pair in itertools.pairwise(sequence)]
    statistics = engine.stats()
    assert statistics.plot["tokens"] == sum(map(len, ids)) == statistics.tokens
    assert statistics.plot["windows"] == len(bigrams)
    assert statistics.plot["window_hits"] == sum(pair in kept for pair in bigrams)
    assert statistics.requests == len(held_out) and statistics.errors == 0


@pytest.mark.parametrize(
    "options",
    [
        {"device": "tpu"},
        {"miss": "guess"},
        {"dtype": "int4"},
        {"backend": "magic"},
        {"max_batch_tokens": 0},
        {"host_memory": "many"},
        {"miss": "budget", "exact_budget": 1.5},
        {"miss": "budget", "exact_budget": float("nan")},
    ],
)
def test_options_out_of_range(store, options):
    name = list(options)[-1]
    with pytest.raises(ValueError, match=name if name != "host_memory" else "many"):
        hmi.Engine(store, **options)


def test_closed_engine(store, make_head):
    fill(store, make_head, 1)
    with hmi.Engine(store) as engine:
        engine.run([hmi.Request("t0", text="a")])
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.run([hmi.Request("t0", text="a")])
    with pytest.raises(EngineClosedError):
        engine.prefetch(["t0"])


def test_inference_leaves_no_gradients(store, make_head):
    fill(store, make_head, 2)
    engine = hmi.Engine(store)
    with torch.enable_grad():
        (response,) = engine.run([hmi.Request("t0", text="the cell")])
    assert response.error is None and torch.is_grad_enabled()


def test_tenant_replaced_between_admission_and_loading(store, make_head):
    fill(store, make_head, 1)
    engine = hmi.Engine(store)
    stale = store.tenants["t0"]
    head = make_head(store.general, labels=("a", "b"))
    store.add_tenant("t0", domain="words", adapter=hmi.Adapter({}), head=head, replace=True)
    with engine._core.residency.holding([stale]) as (tenant,):
        assert tenant.info.generation == store.tenants["t0"].generation
        assert tenant.head.labels == ("a", "b")


def test_a_tenant_under_another_policy_than_its_training_is_told_once(store, make_head):
    card = {"training": {"settings": {"miss": "backoff"}}}
    adapter, head = hmi.Adapter({}), make_head(store.general)
    store.add_tenant("trained", domain="words", adapter=adapter, head=head, card=card)
    request = hmi.Request("trained", text="the cell")
    exact, backoff = hmi.Engine(store, miss="exact"), hmi.Engine(store)
    with pytest.warns(MissPolicyWarning, match="'trained'.*backoff.*exact"):
        exact.run([request, request])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact.run([request])
        backoff.run([request])


def test_a_domain_made_anew_under_the_same_name_is_not_served_from_memory(store, make_head, held_out):
    """As for tenants: what an engine keeps of a domain must not be known by its name alone."""
    store.add_domain("other", ["nothing in common", "nothing in common"])
    adapter, head = hmi.Adapter({}), make_head(store.general)
    store.add_tenant("t", domain="other", adapter=adapter, head=head)
    requests = [hmi.Request("t", text=text) for text in held_out]
    engine = hmi.Engine(store)
    before = engine.run(requests)
    store.remove_tenant("t")
    store.remove_domain("other")
    store.add_domain("other", held_out * 2)
    store.add_tenant("t", domain="other", adapter=adapter, head=head)
    expected = hmi.Engine(store).run(requests)
    assert not np.allclose([scores(r) for r in before], [scores(r) for r in expected], atol=1e-4)
    for first, second in zip(expected, engine.run(requests), strict=True):
        np.testing.assert_array_equal(scores(first), scores(second))
