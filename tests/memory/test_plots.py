"""Leases on the tables: one state of the store for each reader, closed when the last one is done."""

import dataclasses
import itertools
import threading
import weakref
from pathlib import Path

import pytest
import torch

import hmi_kernels
from hmi_engine.errors import StoreCorruptError, UnknownDomainError
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.packing import PackedSequences


def open_plots(store, **options):
    return PlotLibrary(store.layout, store.catalog, store.general, **options)


def pack(store, texts):
    return PackedSequences.pack(store.encoder.token_ids(texts))


def replace(store, name, corpus):
    """Removes a domain and makes it again."""
    store.remove_domain(name)
    store.add_domain(name, corpus)


def mapped(path):
    return str(path) in Path("/proc/self/maps").read_text()


def enter(view, store, sequences, domain="words"):
    domains = [domain] * sequences.num_sequences
    return view.merge(store.model, sequences, domains, view.lookup(sequences, domains))


def test_a_lease_keeps_the_tables_it_began_with(store, corpus, held_out, make_sentences):
    plots, sequences = open_plots(store), pack(store, held_out)
    path = store.layout.resolve(store.domains["words"].file)
    with plots.reading(["words"]) as old:
        before = enter(old, store, sequences)
        replace(store, "words", make_sentences(50, seed=3, longest=6))
        with plots.reading(["words"]) as new:
            after = enter(new, store, sequences)
            assert old.table("words") is not new.table("words")
            assert torch.equal(old.table("words").row_keys.sort().values, old.table("words").row_keys)
        assert not torch.equal(before, after), "the new table holds other rows"
        assert torch.equal(enter(old, store, sequences), before), "the lease still reads the old ones"
        assert not path.exists() and mapped(path)
    assert not mapped(path), "the last reader is done"


def test_tables_are_shared_and_closed_with_the_last_lease(store, corpus):
    plots = open_plots(store)
    first, second = plots.reading(["words"]), plots.reading(["words", "general"])
    assert first.table("words") is second.table("words")
    table = weakref.ref(first.table("words"))
    root = weakref.ref(first.table("general"))
    replace(store, "words", corpus[:20])
    first.release()
    plots.reading(["words"]).release()
    assert table() is not None, "the second lease reads it"
    second.release()
    assert table() is None
    assert root() is not None, "still part of the tree: kept open for the next reader"
    plots.close()
    assert root() is None


def test_a_tree_without_changes_is_read_once(store, monkeypatch):
    plots = open_plots(store)
    plots.reading(["words"]).release()
    monkeypatch.setattr(type(store.domains), "values", None)
    plots.reading(["words"]).release()


def test_names_that_are_unknown(store, corpus):
    plots = open_plots(store)
    with pytest.raises(UnknownDomainError, match="word"):
        plots.reading(["word"])
    store.add_domain("word", corpus[:20])
    plots.reading(["word"]).release()
    store.remove_domain("word")
    with pytest.raises(UnknownDomainError):
        plots.reading(["words", "word"])


def test_a_damaged_table_is_an_error_not_a_loop(store):
    path = store.layout.resolve(store.domains["words"].file)
    path.write_bytes(b"no table")
    with pytest.raises(StoreCorruptError, match=path.name):
        open_plots(store).reading(["words"])


def test_a_file_that_goes_while_it_is_opened_is_tried_again(store, corpus, monkeypatch):
    """The tree is read, then another process replaces the domain and its old file is removed."""
    plots = open_plots(store)
    real, changes = plots._current_tree, iter([lambda: replace(store, "words", corpus[:30])])

    def current_tree():
        tree = real()
        next(changes, lambda: None)()
        return tree

    monkeypatch.setattr(plots, "_current_tree", current_tree)
    with plots.reading(["words"]) as view:
        assert view.table("words").metadata.corpus_tokens == store.domains["words"].corpus_tokens


def test_readers_and_a_writer_at_once(store, corpus, held_out, make_sentences):
    """Every merge is that of one of the tables that there were, whole; nothing is left open."""
    plots, sequences = open_plots(store), pack(store, held_out[:4])
    corpora = [corpus, make_sentences(60, seed=4), make_sentences(30, seed=5)]
    allowed = []
    for texts in corpora:
        replace(store, "words", texts)
        with plots.reading(["words"]) as view:
            allowed.append(enter(view, store, sequences))
    stop, problems, opened = threading.Event(), [], []

    def read_once():
        try:
            view = plots.reading(["words"])
        except UnknownDomainError:
            return  # between removal and creation
        with view:
            opened.append(weakref.ref(view.table("words")))
            results = [enter(view, store, sequences) for _ in range(2)]
        assert torch.equal(*results)
        assert any(torch.equal(results[0], each) for each in allowed)

    def read():
        try:
            while not stop.is_set():
                read_once()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for texts in itertools.islice(itertools.cycle(corpora), 6):
        replace(store, "words", texts)
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems
    plots.close()
    assert all(table() is None for table in opened) and opened


def test_two_batches_compute_the_same_windows_at_once(store, held_out):
    plots, sequences = open_plots(store), pack(store, held_out)
    domains = ["words"] * sequences.num_sequences
    with plots.reading(["words"]) as first, plots.reading(["words"]) as second:
        views = (first, second)
        references = [view.lookup(sequences, domains) for view in views]
        completed = [
            view.compute_misses(store.model, sequences, domains, found)
            for view, found in zip(views, references, strict=True)
        ]
        merged = [
            view.merge(store.model, sequences, domains, each.references)
            for view, each in zip(views, completed, strict=True)
        ]
        assert completed[0].computed == completed[1].computed == plots.overlay.num_rows > 0
        torch.testing.assert_close(*merged)
    with plots.reading(["words"]) as third:
        found = third.lookup(sequences, domains)
        assert third.compute_misses(store.model, sequences, domains, found).computed == 0
        torch.testing.assert_close(third.merge(store.model, sequences, domains, found), merged[0])


def test_domains_with_their_own_layers_share_no_windows(store, corpus, held_out):
    """Another identity: its windows are computed by its layers, and kept apart."""
    asked = []

    def layers_of(identity):
        asked.append(identity)
        return lambda tokens: -store.model.window_states(tokens)

    plots, sequences = open_plots(store, domain_layers=layers_of), pack(store, held_out[:6])
    with plots.reading(["words"]) as view:
        lookalike = view._searched["words"]
        view._searched["own"] = type(lookalike)("other", ("own",), {}, lookalike.unigrams)
        view._places["own"] = 1
        view.chains = torch.cat([view.chains, torch.full_like(view.chains, -1)])
        domains = ["words", "own"] * 3
        references = view.lookup(sequences, domains)
        completed = view.compute_misses(store.model, sequences, domains, references)
        assert asked == ["other"]
        start, end = int(sequences.offsets[1]), int(sequences.offsets[2]) - 1
        tokens = torch.stack(
            [sequences.input_ids[start:end], sequences.input_ids[start + 1 : end + 1]], dim=1
        )
        references = completed.references[start:end, 0]
        tables = (references >> hmi_kernels.ROW_BITS).unique().tolist()
        (number,) = tables
        rows = view.kernel_tables[number].rows[references & ((1 << hmi_kernels.ROW_BITS) - 1)]
        expected = -store.model.window_states(tokens)
        torch.testing.assert_close(rows.float(), expected, atol=5e-3, rtol=5e-3)
    assert [len(plots.overlay.hold(name).tables) for name in ("other", store.general.domain_layers)] == [1, 1]


def test_a_budget_computes_no_more_than_it_may(store, held_out):
    plots, sequences = open_plots(store, overlay_bytes=0), pack(store, held_out)
    domains = ["words"] * sequences.num_sequences
    with plots.reading(["words"]) as view:
        references = view.lookup(sequences, domains)
        everything = view.compute_misses(store.model, sequences, domains, references)
        assert everything.skipped == 0 and plots.overlay.num_rows == 0
        missing = int((everything.references != references).sum())
        for limit in (0, 1, everything.computed - 1, everything.computed, 10**6):
            some = view.compute_misses(store.model, sequences, domains, references, limit=limit)
            assert some.computed == min(limit, everything.computed)
            assert some.skipped == missing - int((some.references != references).sum())


def test_the_corpus_decides_where_traffic_is_unknown(store):
    """Of windows that a batch has as often, the one that the corpus had often goes first."""
    plots, ids = open_plots(store), store.encoder.token_ids(["small is the gene"])
    sequences = PackedSequences.pack(ids)
    windows = torch.stack([sequences.input_ids[:-1], sequences.input_ids[1:]], dim=1)
    keys = hmi_kernels.ngram_keys(torch.nn.functional.pad(windows, (0, 1), value=-1))
    with plots.reading(["general"]) as view:
        order = keys.argsort()
        counts = torch.where(order == 2, 9, 4)
        (table,) = view._plots
        view._plots = [dataclasses.replace(table, candidate_keys=keys[order], candidate_counts=counts)]
        references = view.lookup(sequences, ["general"])
        some = view.compute_misses(store.model, sequences, ["general"], references, limit=1)
    assert (some.references[:, 0] >= 0).nonzero()[:, 0].tolist() == [2]


def test_traffic_decides_between_windows_that_a_batch_has_as_often(store):
    plots = open_plots(store)
    first, second = store.encoder.token_ids(["small is the gene", "type of the server"])
    with plots.reading(["general"]) as view:
        sequences = PackedSequences.pack([first, second])
        references = view.lookup(sequences, ["general"] * 2)
        wanted = (int(second[1]), int(second[2]))

        def weights(keys):
            tokens = hmi_kernels.ngram_tokens(keys)[:, :2]
            return (tokens == torch.tensor(wanted)).all(1).double()

        some = view.compute_misses(
            store.model, sequences, ["general"] * 2, references, limit=1, weights=weights
        )
    # [CLS] and the first word, and the last word and [SEP], differ as well: only the wanted one is computed.
    assert (some.references[:, 0] >= 0).nonzero()[:, 0].tolist() == [len(first) + 1]
