"""What is planned on a state of the tree is refused once that state has changed; at chosen moments."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import sentences

import hmi_engine as hmi
from hmi_engine.construct.domain_tree import TreeChange
from hmi_engine.errors import StoreBusyError
from hmi_engine.knowledge.plot_table import open_plot

TEXTS = [sentences(60, seed=seed) for seed in (30, 31, 32)]
SMALL = "8KiB"
"""A budget under which a domain loses most of its rows."""

Change = Callable[[hmi.Store], object]


@pytest.fixture(scope="module")
def origin(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("origin") / "store"
    with hmi.Store.create(path, general=tiny_bert, plot_layers=2) as store:
        store.add_domain("base", TEXTS[0], min_count=1)
        store.add_domain("child", TEXTS[0], parent="base", min_count=1)
        store.add_domain("empty", TEXTS[0], parent="base", min_count=1, plot_bytes="0")
        store.add_domain("other", TEXTS[0], min_count=1)
    return path


@pytest.fixture
def path(origin: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(origin, tmp_path / "store"))


def rows(store: hmi.Store) -> dict[str, list[int]]:
    """The n-grams with a row of each domain's own."""
    return {
        name: open_plot(store.layout.resolve(info.file)).row_keys.tolist()
        for name, info in store.domains.items()
        if info.file
    }


def shrink(store: hmi.Store) -> None:
    store.update_domain("base", TEXTS[1], plot_bytes=SMALL)


def add(store: hmi.Store) -> None:
    store.add_domain("new", TEXTS[0], parent="base", min_count=1)


def move(store: hmi.Store) -> None:
    store.move_domain("other", "base")


def grow_child(store: hmi.Store) -> None:
    store.update_domain("empty", TEXTS[2], plot_bytes="1MiB")


PAIRS: dict[str, tuple[Change, Change]] = {
    "add below what is updated": (add, shrink),
    "update what is added below": (shrink, add),
    "update below what is updated": (grow_child, shrink),
    "update above what is updated": (shrink, grow_child),
    "move below what is updated": (move, shrink),
    "update what is moved below": (shrink, move),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_a_table_is_not_planned_against_one_that_changes_meanwhile(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pair: str
) -> None:
    slow, quick = PAIRS[pair]
    one_after_the_other = Path(shutil.copytree(path, tmp_path / "expected"))
    commit = TreeChange.commit

    with hmi.Store.open(path) as store, hmi.Store.open(path) as other:

        def commit_later(change: TreeChange, **options: object) -> None:
            monkeypatch.setattr(TreeChange, "commit", commit)
            quick(other)
            commit(change, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(TreeChange, "commit", commit_later)
        with pytest.raises(StoreBusyError, match="someone else meanwhile; try again"):
            slow(store)
        slow(store)
        found = rows(store)
        assert store.verify() == []
    with hmi.Store.open(one_after_the_other) as store:
        quick(store)
        slow(store)
        assert found == rows(store)
        assert sum(map(len, found.values())) > 100


def test_an_interrupted_addition_is_planned_anew_where_what_is_above_has_changed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(TEXTS[0]))

    def add_file(store: hmi.Store) -> None:
        store.add_domain("new", corpus, parent="base", min_count=1)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with hmi.Store.open(path) as store:
        with monkeypatch.context() as patched:
            patched.setattr(TreeChange, "commit", interrupt)
            with pytest.raises(KeyboardInterrupt):
                add_file(store)
        before = open_plot(store.layout.resolve(str(store.domains["base"].file)))
        store.update_domain("base", plot_bytes=store.domains["base"].bytes * 9 // 10)
        after = open_plot(store.layout.resolve(str(store.domains["base"].file)))
        assert after.metadata == before.metadata and len(after.row_keys) < len(before.row_keys)
        expected = Path(shutil.copytree(path, tmp_path / "expected"))
        add_file(store)
        found = rows(store)
    shutil.rmtree(expected / "builds")
    with hmi.Store.open(expected) as store:
        add_file(store)
        assert found == rows(store) and found["new"]


def test_a_change_beside_it_disturbs_nobody(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = TreeChange.commit
    with hmi.Store.open(path) as store, hmi.Store.open(path) as other:

        def commit_later(change: TreeChange, **options: object) -> None:
            monkeypatch.setattr(TreeChange, "commit", commit)
            other.update_domain("other", TEXTS[1])
            other.remove_domain("child")  # its own rows are nobody else's
            commit(change, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(TreeChange, "commit", commit_later)
        store.add_domain("new", TEXTS[0], parent="base", min_count=1)
        assert {"new", "other"} <= set(store.domains) and "child" not in store.domains


def test_an_interrupt_after_the_commit_keeps_what_was_committed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hmi.Store.open(path) as store:
        commit = store.catalog.commit_domains

        def commit_then_interrupt(*arguments: object, **options: object) -> None:
            commit(*arguments, **options)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        monkeypatch.setattr(store.catalog, "commit_domains", commit_then_interrupt)
        for change in (add, shrink):
            with pytest.raises(KeyboardInterrupt):
                change(store)
        assert "new" in store.domains
        assert {problem.kind for problem in store.verify()} <= {"unfinished"}


def test_an_interrupt_before_the_commit_leaves_no_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with hmi.Store.open(path) as store:
        before = set(store.catalog.files())
        monkeypatch.setattr(store.catalog, "commit_domains", interrupt)
        for change in (add, shrink):
            with pytest.raises(KeyboardInterrupt):
                change(store)
        assert set(store.catalog.files()) == before
        assert {problem.kind for problem in store.verify()} == {"unfinished"}


@pytest.fixture
def before_snapshot(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change, hmi.Store], None]:
    """Lets a change be made right before the next one takes its snapshot of the tree."""
    start = TreeChange.__init__

    def arrange(change: Change, store: hmi.Store) -> None:
        def start_later(self: TreeChange, *arguments: object, **options: object) -> None:
            monkeypatch.setattr(TreeChange, "__init__", start)
            change(store)
            start(self, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(TreeChange, "__init__", start_later)

    return arrange


def other_layers(tiny_bert: Path) -> dict[str, torch.Tensor]:
    from transformers import BertModel

    model = BertModel.from_pretrained(tiny_bert)
    return {name: tensor + 0.01 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}


def test_an_addition_is_planned_from_the_snapshot_alone(
    path: Path, tiny_bert: Path, before_snapshot: Callable[[Change, hmi.Store], None]
) -> None:
    layers = other_layers(tiny_bert)
    with hmi.Store.open(path) as store, hmi.Store.open(path) as other:
        before_snapshot(lambda store: store.set_domain_layers("base", layers), other)
        add(store)
        info = store.domains["new"]
        table = open_plot(store.layout.resolve(str(info.file)))
        assert table.metadata.layer_identity == info.layer_identity == store.domains["base"].layer_identity


def test_an_update_keeps_the_budget_of_the_snapshot(
    path: Path, before_snapshot: Callable[[Change, hmi.Store], None]
) -> None:
    with hmi.Store.open(path) as store, hmi.Store.open(path) as other:
        before_snapshot(shrink, other)
        store.update_domain("base", TEXTS[2])
        assert store.domains["base"].plot_bytes == 8 << 10


def test_layers_of_a_change_under_way_are_no_garbage(
    path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = other_layers(tiny_bert)
    commit = TreeChange.commit
    with hmi.Store.open(path) as store:

        def collect_first(change: TreeChange, **options: object) -> None:
            assert "orphan" not in {problem.kind for problem in store.verify()}
            assert store.collect_garbage() == []
            commit(change, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(TreeChange, "commit", collect_first)
        store.set_domain_layers("base", layers)
        assert store.verify() == []

        def fail(change: TreeChange, **options: object) -> None:
            raise StoreBusyError("on purpose")

        monkeypatch.setattr(TreeChange, "commit", fail)
        with pytest.raises(StoreBusyError):
            store.set_domain_layers("child", layers)
        assert store.verify() == [], "the file of a change that failed goes with it"
