"""What an engine does where the table has no row: exact outputs depend on nothing else, budgets hold."""

import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference_hbert import backed_off, merged
from transformers import BertModel

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.errors import MissPolicyWarning, StoreCorruptError
from hmi_engine.knowledge.plot_table import open_plot, write_plot
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.packing import PackedSequences, window_tokens


def scores(responses):
    assert all(response.error is None for response in responses), responses
    return np.array([list(response.scores.values()) for response in responses])


def make_store(tiny_bert, path, corpus, make_head, window=2, **options):
    store = hmi.Store.create(path, general=tiny_bert, plot_layers=2, window=window, row_dtype="float32")
    store.add_domain("words", corpus, **options)
    store.add_tenant("t", domain="words", adapter=hmi.Adapter({}), head=make_head(store.general))
    return store


@pytest.fixture(scope="module")
def stores(tiny_bert, tmp_path_factory, corpus):
    """Stores of the same model whose tables hold everything, something and nothing, by window."""
    from conftest import classification_head

    folder = tmp_path_factory.mktemp("stores")
    contents = [(corpus, {}), (corpus, {"plot_bytes": "8KiB"}), (["the cell"], {"min_count": 9})]
    opened = {
        window: [
            make_store(
                tiny_bert, folder / f"{window}-{number}", texts, classification_head, window, **options
            )
            for number, (texts, options) in enumerate(contents)
        ]
        for window in (2, 3)
    }
    yield opened
    for group in opened.values():
        for store in group:
            store.close()


@pytest.fixture(scope="module")
def expected(stores, held_out):
    """Scores of the held-out texts, every window computed: nothing is kept, and the table is empty."""
    return {
        window: scores(
            hmi.Engine(group[-1], miss="exact", overlay_memory=0).run(
                [hmi.Request("t", text=text) for text in held_out]
            )
        )
        for window, group in stores.items()
    }


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    window=st.sampled_from([2, 3]),
    table=st.integers(0, 2),
    overlay_rows=st.sampled_from([0, 1, 7, 40, 10_000]),
    budget=st.sampled_from([None, 1.0]),
    max_batch_tokens=st.sampled_from([1, 40, 8192]),
    order=st.permutations(range(24)),
)
def test_exact_outputs_depend_on_nothing_but_the_text(
    stores, expected, held_out, window, table, overlay_rows, budget, max_batch_tokens, order
):
    """Nor on the table, on what was kept of earlier batches, on batches, or on a budget that suffices."""
    options = {"miss": "exact"} if budget is None else {"miss": "budget", "exact_budget": budget}
    engine = hmi.Engine(
        stores[window][table],
        overlay_memory=2 * overlay_rows * (window * 32 * 4 + 76),
        max_batch_tokens=max_batch_tokens,
        **options,
    )
    requests = [hmi.Request("t", text=held_out[number]) for number in order]
    for _ in range(2):
        np.testing.assert_allclose(scores(engine.run(requests)), expected[window][order], atol=1e-4)
    assert engine.stats().plot["budget_skipped"] == 0


@pytest.mark.parametrize("window", [2, 3])
def test_engines_of_many_threads_share_nothing_but_the_truth(stores, expected, held_out, window):
    """Several engines' batches on one library: overlay turning, leases open, same windows at once."""
    store = stores[window][1]
    plots = PlotLibrary(
        store.layout, store.catalog, store.general, overlay_bytes=2 * 30 * (window * 32 * 4 + 76)
    )
    engine = hmi.Engine(stores[window][2], miss="exact")
    problems = []

    def work(seed):
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist()
        try:
            for number in order:
                sequences = PackedSequences.pack(store.encoder.token_ids([held_out[number]]))
                with plots.reading(["words"]) as view, torch.no_grad():
                    references = view.lookup(sequences, ["words"])
                    completed = view.compute_misses(store.model, sequences, ["words"], references)
                    entered = view.merge(store.model, sequences, ["words"], completed.references)
                torch.testing.assert_close(entered, wanted[number], atol=1e-4, rtol=1e-4)
        except BaseException as error:
            problems.append(error)

    wanted = {}
    for number, text in enumerate(held_out):
        sequences = PackedSequences.pack(store.encoder.token_ids([text]))
        with engine._core.plots.reading(["words"]) as view, torch.no_grad():
            references = view.lookup(sequences, ["words"])
            completed = view.compute_misses(store.model, sequences, ["words"], references)
            wanted[number] = view.merge(store.model, sequences, ["words"], completed.references)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


@pytest.mark.parametrize("window", [2, 3])
@torch.no_grad()
def test_a_budget_is_exact_where_it_reaches_and_back_off_elsewhere(stores, tiny_bert, held_out, window):
    """Against the written-out mathematics: the windows that were computed count as held."""
    store, model = stores[window][1], BertModel.from_pretrained(tiny_bert).eval()
    plots = PlotLibrary(store.layout, store.catalog, store.general, overlay_bytes=0)
    ids = store.encoder.token_ids([max(held_out, key=len)])[0]
    sequences = PackedSequences.pack([ids])
    with plots.reading(["words"]) as view:
        held = set(map(tuple, hmi_kernels.ngram_tokens(view.table("words").row_keys).tolist()))
        some = view.compute_misses(
            store.model, sequences, ["words"], view.lookup(sequences, ["words"]), limit=3, weights=num_tokens
        )
        entered = view.merge(store.model, sequences, ["words"], some.references)
    assert some.computed == 3 and some.skipped > 0
    reached = some.references[:, 0] >= 0
    held |= set(map(tuple, window_tokens(sequences, window)[reached].tolist()))

    def has(tokens):
        padded = [-1 if token is None else token for token in tokens]
        return tuple(padded + [-1] * (3 - len(padded))) in held

    expected = backed_off(model, ids, 2, window, has)
    torch.testing.assert_close(entered, expected, atol=1e-4, rtol=1e-4)
    exact = merged(model, ids, 2, window)
    assert not torch.allclose(entered, exact, atol=1e-3), "three windows are not all"


def num_tokens(keys):
    """Prefers whole windows to those at the ends of a text, which look like the bigrams of back-off."""
    return (hmi_kernels.ngram_tokens(keys) >= 0).sum(1)


@pytest.mark.parametrize("max_batch_tokens", [8192, 1])
def test_a_budget_counts_what_it_did(stores, held_out, max_batch_tokens):
    """However small batches are, here of a text each."""
    requests = [hmi.Request("t", text=text) for text in held_out]
    engine = hmi.Engine(
        stores[2][2],
        miss="budget",
        exact_budget=0.1,
        overlay_memory=0,
        max_batch_tokens=max_batch_tokens,
    )
    engine.run(requests)
    plot = engine.stats().plot
    assert plot["windows_computed"] == int(0.1 * plot["tokens"])
    misses = plot["windows"] - plot["window_hits"]
    assert misses - plot["windows_computed"] >= plot["budget_skipped"] > 0
    none = hmi.Engine(stores[2][2], miss="budget", exact_budget=0.0)
    np.testing.assert_array_equal(scores(none.run(requests)), scores(hmi.Engine(stores[2][2]).run(requests)))
    assert none.stats().plot["windows_computed"] == 0


def test_a_budget_reaches_further_with_every_batch(stores, held_out):
    """What was computed is found later, and the budget goes to what is still missing."""
    requests = [hmi.Request("t", text=text) for text in held_out]
    engine = hmi.Engine(stores[2][2], miss="budget", exact_budget=0.2)
    skipped = []
    for _ in range(8):
        before = engine.stats().plot["budget_skipped"]
        last = engine.run(requests)
        skipped.append(engine.stats().plot["budget_skipped"] - before)
    assert skipped == sorted(skipped, reverse=True) and skipped[-1] == 0
    exact = hmi.Engine(stores[2][2], miss="exact").run(requests)
    np.testing.assert_allclose(scores(last), scores(exact), atol=1e-4)


def test_tenants_trained_for_back_off_suit_a_budget(stores, make_head, recwarn):
    store = stores[2][0]
    for miss in ("backoff", "exact"):
        store.add_tenant(
            miss,
            domain="words",
            adapter=hmi.Adapter({}),
            head=make_head(store.general),
            card={"training": {"settings": {"miss": miss}}},
        )
    engine = hmi.Engine(store, miss="budget")
    engine.run([hmi.Request("backoff", text="the cell")])
    assert not [warning for warning in recwarn if warning.category is MissPolicyWarning]
    with pytest.warns(MissPolicyWarning, match="'exact'.*'budget'"):
        engine.run([hmi.Request("exact", text="the cell")])


def cut(path):
    path.write_bytes(b"no table")


def send_astray(path):
    """Every n-gram is at a row that the table does not have."""
    table = open_plot(path)
    index = table.index.clone()
    index[index[:, 0] != 0, 1] += 1 << 20
    write_plot(path, replace(table, index=index))


@pytest.mark.parametrize("damage", [cut, send_astray])
def test_a_damaged_table_fails_its_own_requests(tiny_bert, tmp_path, corpus, make_head, held_out, damage):
    with make_store(tiny_bert, tmp_path / "store", corpus, make_head) as store:
        store.add_domain("other", corpus[:50])
        store.add_tenant("other", domain="other", adapter=hmi.Adapter({}), head=make_head(store.general))
        requests = [
            hmi.Request(("t", "other")[number % 2], text=text) for number, text in enumerate(held_out)
        ]
        expected = hmi.Engine(store).run(requests)
        damage(store.layout.resolve(store.domains["other"].file))
        responses = hmi.Engine(store).run(requests)
        assert all(isinstance(response.error, StoreCorruptError) for response in responses[1::2])
        np.testing.assert_allclose(scores(responses[::2]), scores(expected[::2]), atol=1e-5)
        alone = hmi.Engine(store).run(requests[1::2])
        assert all(isinstance(response.error, StoreCorruptError) for response in alone)


@pytest.mark.parametrize(
    ("window", "asked", "question", "frequent"),
    [
        (2, "a gene drug a", "cell gene drug cell", ("gene", "drug")),
        (3, "a cell gene drug a", "cell gene drug cell", ("cell", "gene", "drug")),
    ],
)
def test_a_budget_goes_to_what_traffic_asks_for(stores, tmp_path, window, asked, question, frequent):
    """Each window of the question is in its batch once; one of them was asked for before."""
    computed = []
    path = shutil.copytree(stores[window][2].layout.root, tmp_path / "store")
    with hmi.Store.open(path) as store:
        [ids] = store.encoder.token_ids([" ".join(frequent)])
        compute = store.model.window_states

        def window_states(tokens):
            computed.append(tokens.tolist())
            return compute(tokens)

        store.model.window_states = window_states
        with hmi.Engine(store, miss="budget", exact_budget=1.01 / 6, overlay_memory=0) as engine:
            engine.run([hmi.Request("t", text=asked)] * 3)
            computed.clear()
            engine.run([hmi.Request("t", text=question)])
        assert computed == [[ids[1:-1]]]
