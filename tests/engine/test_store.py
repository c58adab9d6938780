"""What a store keeps: domains whose rows are stored once, tenants, and what it refuses."""

import gzip
import itertools
import json
import resource
import shutil
import signal
from collections import Counter

import pytest
import torch

import hmi_engine as hmi
import hmi_kernels
from hmi_engine.errors import (
    CorpusError,
    DomainExistsError,
    DomainInUseError,
    InvalidAdapterError,
    InvalidHeadError,
    InvalidNameError,
    ReadOnlyStoreError,
    StoreExistsError,
    StoreFullError,
    StoreNotFoundError,
    TenantExistsError,
    UnknownDomainError,
    UnknownTenantError,
    UnsupportedModelError,
)
from hmi_engine.memory.plots import PlotLibrary


def bigrams(store, texts):
    return Counter(pair for ids in store.encoder.token_ids(list(texts)) for pair in itertools.pairwise(ids))


def kept(store, domain):
    """{bigram: count} of a domain's own table."""
    table = PlotLibrary(store.layout, store.catalog, store.general).reading([domain]).table(domain)
    tokens = hmi_kernels.ngram_tokens(table.row_keys).tolist()
    return {tuple(row[:2]): count for row, count in zip(tokens, table.row_counts.tolist(), strict=True)}


def test_a_table_holds_the_frequent_bigrams_of_its_corpus(store, corpus):
    expected = {pair: count for pair, count in bigrams(store, corpus).items() if count >= 2}
    assert kept(store, "words") == expected
    info = store.domains["words"]
    assert info.rows == len(expected) and info.corpus_tokens == sum(map(len, store.encoder.token_ids(corpus)))
    total = bigrams(store, corpus).total()
    assert info.card["hit_mass"] == pytest.approx(sum(expected.values()) / total)


def test_rows_are_stored_once_at_the_highest_ancestor(store, corpus, make_sentences):
    more = make_sentences(200, seed=8)
    store.add_domain("child", more, parent="words")
    above, own = set(kept(store, "words")), set(kept(store, "child"))
    frequent = {pair for pair, count in bigrams(store, more).items() if count >= 2}
    assert not above & own
    assert own == frequent - above
    plots = PlotLibrary(store.layout, store.catalog, store.general).reading(["child", "words"])
    assert plots.ancestors("child") == ("child", "words", "general")
    assert plots.ancestors("words") == ("words", "general")


def test_a_small_budget_keeps_the_most_frequent(store, corpus):
    store.add_domain("small", corpus, plot_bytes="8KiB")
    small, whole = kept(store, "small"), bigrams(store, corpus)
    assert 0 < len(small) < len(kept(store, "words"))
    assert min(small.values()) >= max(count for pair, count in whole.items() if pair not in small)
    assert store.domains["small"].admission_count == min(small.values())
    table = PlotLibrary(store.layout, store.catalog, store.general).reading(["small"]).table("small")
    parts = (table.index, table.rows, table.row_keys, table.row_counts)
    assert sum(part.numel() * part.itemsize for part in parts) <= 8 << 10


def test_window_3_counts_trigrams_and_both_bigrams(tiny_bert, tmp_path, corpus):
    with hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=1, window=3) as store:
        store.add_domain("words", corpus)
        table = PlotLibrary(store.layout, store.catalog, store.general).reading(["words"]).table("words")
        found = dict(
            zip(
                map(tuple, hmi_kernels.ngram_tokens(table.row_keys).tolist()),
                table.row_counts.tolist(),
                strict=True,
            )
        )
        expected = Counter()
        for ids in store.encoder.token_ids(corpus):
            expected.update(zip(ids, ids[1:], ids[2:], strict=False))
            expected.update((a, b, -1) for a, b in itertools.pairwise(ids))
            expected.update((-1, a, b) for a, b in itertools.pairwise(ids))
    assert found == {window: count for window, count in expected.items() if count >= 2}


def test_corpora_of_every_form_give_the_same_table(store, tmp_path, corpus):
    plain = tmp_path / "texts.txt"
    plain.write_text("\n".join(corpus))
    half = len(corpus) // 2
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = [json.dumps({"text": text}) for text in corpus]
    (folder / "a.jsonl").write_text("\n".join([*lines[:half], "{no json", '{"body": 1}']))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write("\n".join(lines[half:]))
    store.add_domain("plain", plain)
    report = store.add_domain("folder", folder)
    store.add_domain("stream", (text for text in corpus))
    assert kept(store, "plain") == kept(store, "folder") == kept(store, "stream") == kept(store, "words")
    assert report.texts == len(corpus) and report.num_bad_lines == 2
    assert {bad.line for bad in report.bad_lines} == {half + 1, half + 2}


def test_domains_are_refused_before_anything_is_read(store):
    def never():
        raise AssertionError("the corpus was read")
        yield

    for name, parent, error in (
        ("words", "general", DomainExistsError),
        ("../up", "general", InvalidNameError),
        ("new", "nowhere", UnknownDomainError),
    ):
        with pytest.raises(error):
            store.add_domain(name, never(), parent=parent)
    with pytest.raises(ValueError, match="many"):
        store.add_domain("new", never(), plot_bytes="many")
    with pytest.raises(CorpusError):
        store.add_domain("new", [])
    assert set(store.domains) == {"general", "words"}


def test_tenants_are_refused_when_they_are_added(store, make_head):
    general = store.general
    good = hmi.random_adapter(general, "lora", 4, 0)
    (place, block), *_ = good.blocks.items()
    bad = torch.full_like(block.a, float("nan"))
    wrong = {
        "values": hmi.Adapter({place: hmi.LoraBlock(bad, block.b, 1.0)}),
        "shape": hmi.Adapter({place: hmi.LoraBlock(block.a[:-1], block.b, 1.0)}),
        "dtype": hmi.Adapter({place: hmi.LoraBlock(block.a.long(), block.b, 1.0)}),
        "layer": hmi.Adapter({(0, place[1]): block}),
    }
    for adapter in wrong.values():
        with pytest.raises(InvalidAdapterError, match=r"layer"):
            store.add_tenant("t", domain="words", adapter=adapter, head=make_head(general))
    short = hmi.ClassificationHead(("a",), torch.zeros(1, 5), torch.zeros(1), "cls")
    with pytest.raises(InvalidHeadError):
        store.add_tenant("t", domain="words", adapter=good, head=short)
    for name in ("/etc/passwd", "..", "a/b/c", "", "a b", "x" * 65, "a/../b"):
        with pytest.raises(InvalidNameError):
            store.add_tenant(name, domain="words", adapter=good, head=make_head(general))
    with pytest.raises(UnknownDomainError):
        store.add_tenant("t", domain="nowhere", adapter=good, head=make_head(general))
    store.add_tenant("acme/t", domain="words", adapter=good, head=make_head(general))
    with pytest.raises(TenantExistsError):
        store.add_tenant("acme/t", domain="words", adapter=good, head=make_head(general))
    assert list(store.tenants) == ["acme/t"] and store.verify() == []
    with pytest.raises(DomainInUseError):
        store.remove_domain("words")
    with pytest.raises(UnknownTenantError, match="acme/t"):
        store.remove_tenant("acme/tt")


def test_a_tenant_comes_back_as_it_was_added(store, make_head):
    for kind in ("lora", "bottleneck"):
        adapter, head = hmi.random_adapter(store.general, kind, 5, 3), make_head(store.general)
        store.add_tenant(kind, domain="words", adapter=adapter, head=head, card={"made": "here"})
        again, same_head = store.load_tenant(kind)
        for place, block in adapter.blocks.items():
            for name, tensor in block.tensors().items():
                assert torch.equal(again.blocks[place].tensors()[name], tensor)
        assert torch.equal(same_head.weight, head.weight) and same_head.labels == head.labels
        assert store.tenants[kind].card == {"made": "here"}


def test_open_and_create(tiny_bert, tmp_path, store):
    with pytest.raises(StoreExistsError):
        hmi.Store.create(store.layout.root, general=tiny_bert)
    with pytest.raises(StoreNotFoundError, match="hmi init"):
        hmi.Store.open(tmp_path)
    with hmi.Store.open(store.layout.root, read_only=True) as reader:
        assert set(reader.domains) == {"general", "words"}
        for change in (
            lambda: reader.add_domain("new", ["the cell", "the cell"]),
            lambda: reader.remove_domain("words"),
            lambda: reader.remove_tenant("t"),
        ):
            with pytest.raises((ReadOnlyStoreError, UnknownTenantError)):
                change()


def test_a_full_disk_leaves_no_store_behind(tiny_bert, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        with pytest.raises(StoreFullError, match="no room"):
            hmi.Store.create(tmp_path / "store", general=tiny_bert)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_domains_as_they_were(store, corpus):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # Too little for the table, enough for the catalog's own log.
        resource.setrlimit(resource.RLIMIT_FSIZE, (store.domains["words"].bytes - 1, limits[1]))
        with pytest.raises(StoreFullError):
            store.add_domain("new", corpus)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert set(store.domains) == {"general", "words"}
    # What was computed is kept, so that the same command goes on once there is room.
    assert {problem.kind for problem in store.verify()} <= {"unfinished"}
    store.add_domain("new", corpus)
    assert store.verify() == []


def test_without_domain_layers_a_domain_is_a_name(tiny_bert, tmp_path, corpus, make_head):
    with hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=0) as store:
        store.add_domain("words", corpus)
        assert store.domains["words"].rows == 0
        store.add_tenant("t", domain="words", adapter=hmi.Adapter({}), head=make_head(store.general))
        (response,) = hmi.Engine(store).run([hmi.Request("t", text="the cell")])
        assert response.error is None


def without_tokens(bert, folder, *names):
    """A copy of a base model whose tokenizer does not know what some special tokens are for."""
    shutil.copytree(bert, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key not in names}))
    return folder


def test_unknown_neighbors_need_a_token_that_stands_for_them(tiny_bert, tmp_path, store):
    assert store.general.placeholder_token_id == 4  # [MASK]
    no_mask = without_tokens(tiny_bert, tmp_path / "no_mask", "mask_token")
    with hmi.Store.create(tmp_path / "one", general=no_mask) as made:
        assert made.general.placeholder_token_id == 1  # [UNK]
    neither = without_tokens(tiny_bert, tmp_path / "neither", "mask_token", "unk_token")
    with pytest.raises(UnsupportedModelError, match=r"mask token .* plot_layers=0"):
        hmi.Store.create(tmp_path / "two", general=neither)
    assert not (tmp_path / "two").exists()
    with hmi.Store.create(tmp_path / "three", general=neither, plot_layers=0) as made:
        assert made.general.placeholder_token_id is None
