"""Changes of the domain tree that are killed at any moment: the store opens, verifies and answers."""

import hashlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sentences
from crash_child import BATCH_WINDOWS, CrashRunner
from safetensors.torch import load_file, save_file

import hmi_engine as hmi
from hmi_engine.knowledge.plot_table import PlotTable, open_plot, unigram_slots_of
from hmi_engine.knowledge.traffic_file import TrafficCounts
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.memory.traffic import TrafficRecorder
from hmi_engine.models.packing import PackedSequences

QUESTIONS = sentences(12, seed=3)
CHANGES: dict[str, dict[str, Any]] = {
    "add": {
        "call": "add_domain",
        "arguments": ["new", sentences(120, seed=6)],
        "options": {"parent": "base", "min_count": 1},
    },
    "update": {"call": "update_domain", "arguments": ["base", sentences(120, seed=7)]},
    "move": {"call": "move_domain", "arguments": ["child", "other"]},
    "traffic": {"call": "update_domain", "arguments": ["base"], "options": {"max_promotions": 40}},
    "layers": {"call": "set_domain_layers", "arguments": ["base", "{layers}"]},
}
State = dict[str, tuple[object, ...]]


@pytest.fixture(scope="module")
def runner() -> Iterator[CrashRunner]:
    started = CrashRunner()
    yield started
    started.close()


@pytest.fixture(scope="module")
def origin(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a small tree, as it is before each change."""
    path = tmp_path_factory.mktemp("origin") / "store"
    with hmi.Store.create(path, general=tiny_bert, plot_layers=2) as store:
        store.add_domain("base", sentences(60, seed=4))
        store.add_domain("child", sentences(60, seed=5), parent="base", min_count=1)
        store.add_domain("other", sentences(60, seed=8), min_count=1)
        for seed, name in enumerate(("base", "other", "base")):
            store.save_traffic(name, traffic(store, sentences(60, seed=9 + seed)))
    save_other_layers(tiny_bert, path.parent / "layers.safetensors")
    return path


def traffic(store: hmi.Store, texts: list[str]) -> TrafficCounts:
    """What an engine would have counted of these texts."""
    recorder = TrafficRecorder(store.general.window)
    sequences = PackedSequences.pack(store.encoder.token_ids(texts))
    hits = torch.zeros(sequences.num_tokens, dtype=torch.bool)
    recorder.record(sequences, ["any"] * len(texts), hits)
    return recorder.drain("any")


def save_other_layers(source: Path, path: Path) -> None:
    """The base model's layers with other weights."""
    weights = load_file(source / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    save_file(
        {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in weights.items()
        },
        path,
    )


@pytest.fixture
def change(name: str, origin: Path) -> dict[str, Any]:
    """One of the changes, as a job."""
    described = CHANGES[name]
    layers = str(origin.parent / "layers.safetensors")
    return described | {
        "arguments": [layers if given == "{layers}" else given for given in described["arguments"]]
    }


@pytest.fixture
def copy(origin: Path, tmp_path: Path) -> Callable[[Path | None], Path]:
    """Copies the store, or a given one, to a new place."""
    numbers = iter(range(10_000))

    def copy(source: Path | None = None) -> Path:
        return Path(shutil.copytree(source or origin, tmp_path / str(next(numbers))))

    return copy


def digest(table: PlotTable) -> str:
    """All that a table holds."""
    contents = hashlib.sha256(table.metadata.model_dump_json().encode())
    for tensor in (
        table.rows,
        table.row_keys,
        table.row_counts,
        table.candidate_keys,
        table.candidate_counts,
        table.documents,
    ):
        contents.update(tensor.contiguous().numpy().tobytes())
    return contents.hexdigest()


def state(path: Path) -> State:
    """What a store's domains are, which rows each finds for the same questions, and what traffic waits."""
    with hmi.Store.open(path) as store:
        plots = PlotLibrary(store.layout, store.catalog, store.general, overlay_bytes=1 << 16)
        questions = PackedSequences.pack(store.encoder.token_ids(QUESTIONS))
        found: State = {}
        for info in store.domains.values():
            with plots.reading([info.name]) as view:
                rows = view.row_keys(view.lookup(questions, [info.name] * len(QUESTIONS)))
            table = open_plot(store.layout.resolve(info.file)) if info.file else None
            found[info.name] = (
                info.parent,
                info.layer_identity,
                table and digest(table),
                sum(file.tokens for file in store.catalog.traffic_files() if file.domain_id == info.id),
                tuple(rows.flatten().tolist()),
            )
        plots.close()
        return found


def check_killed(path: Path, before: State, after: State) -> None:
    """The store at ``path`` was left by a killed change: what a person and a next process meet there."""
    with hmi.Store.open(path) as store:
        problems = store.verify()
        assert {problem.kind for problem in problems} <= {"orphan", "unfinished"}, problems
        assert all(problem.repairable for problem in problems)
    found = state(path)
    assert found in (before, after)
    mended = Path(shutil.copytree(path, path.with_name(f"{path.name}.mended")))
    with hmi.Store.open(mended) as store:
        store.repair(store.verify())
        assert store.verify() == []
    assert state(mended) == found
    shutil.rmtree(mended)


def go_on(runner: CrashRunner, path: Path, change: dict[str, Any], after: State) -> dict[str, Any]:
    """Give the killed change again; it ends as if it had never been killed."""
    resumed = runner.run(store=str(path), **change)
    assert resumed["status"] == 0, resumed
    assert state(path) == after
    with hmi.Store.open(path) as store:
        # What the killed process was writing itself may still lie there.
        assert {problem.kind for problem in store.verify()} <= {"orphan"}
    return resumed


def some(points: list[str], count: int, seed: str) -> list[int]:
    """All steps at which a change becomes visible, and others drawn at random up to ``count``."""
    turning = [n for n, point in enumerate(points) if "commit" in point or "os.rename" in point]
    rest = [n for n in range(len(points)) if n not in turning]
    generator = random.Random(seed)
    chosen = generator.sample(turning, min(len(turning), count // 2))
    return sorted(chosen + generator.sample(rest, min(len(rest), count - len(chosen))))


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(
    "count", [pytest.param(6, id="some"), pytest.param(100_000, id="all", marks=pytest.mark.slow)]
)
def test_a_change_killed_at_a_chosen_step(
    runner: CrashRunner,
    origin: Path,
    copy: Callable[..., Path],
    name: str,
    change: dict[str, Any],
    count: int,
) -> None:
    whole = copy()
    uninterrupted = runner.run(store=str(whole), **change)
    assert uninterrupted["status"] == 0, uninterrupted
    before, after = state(origin), state(whole)
    assert before != after and len(uninterrupted["points"]) > 8
    with hmi.Store.open(origin) as store:
        # Unlike those of n-grams, the rows of single tokens are not kept batch by batch.
        unigrams = unigram_slots_of("bert") * store.general.vocab_size if name == "layers" else 0
    for kill_at in some(uninterrupted["points"], count, name):
        path = copy()
        killed = runner.run(store=str(path), kill_at=kill_at, **change)
        assert killed["status"] == -9, killed
        check_killed(path, before, after)
        if state(path) == before:
            resumed = go_on(runner, path, change, after)
            # The last batch before the kill may not have reached the disk.
            again = killed["windows"] + resumed["windows"] - uninterrupted["windows"]
            assert 0 <= again <= BATCH_WINDOWS + unigrams, (killed, resumed)
        shutil.rmtree(path)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize(
    "count", [pytest.param(2, id="some"), pytest.param(100, id="many", marks=pytest.mark.slow)]
)
def test_a_change_killed_at_a_random_moment(
    runner: CrashRunner,
    origin: Path,
    copy: Callable[..., Path],
    name: str,
    change: dict[str, Any],
    count: int,
) -> None:
    """Also inside a call of the kernels, of SQLite or of the system, where no step is counted."""
    generator = random.Random(name)
    whole = copy()
    uninterrupted = runner.run(store=str(whole), **change)
    before, after = state(origin), state(whole)
    for _ in range(count):
        path = copy()
        delay = generator.uniform(0, uninterrupted["seconds"])
        killed = runner.run(store=str(path), kill_after=delay, **change)
        assert killed["status"] in (0, -9), killed
        check_killed(path, before, after)
        if state(path) == before:
            go_on(runner, path, change, after)
        shutil.rmtree(path)


def test_a_change_killed_again_and_again_comes_to_its_end(
    runner: CrashRunner, copy: Callable[..., Path]
) -> None:
    """Each attempt gets one batch further than the one before."""
    change, path, whole = CHANGES["add"], copy(), copy()
    uninterrupted = runner.run(store=str(whole), **change)
    batches = [n for n, point in enumerate(uninterrupted["points"]) if point.startswith("fdatasync")]
    assert len(batches) > 4
    computed, attempts = 0, 0
    while (done := runner.run(store=str(path), kill_windows=BATCH_WINDOWS, **change))["status"] == -9:
        computed += done["windows"]
        attempts += 1
        assert attempts < 1000
    assert done["status"] == 0 and attempts > 1
    assert computed + done["windows"] == uninterrupted["windows"]
    assert state(path) == state(whole)


@pytest.mark.parametrize("name", CHANGES)
def test_files_are_on_the_disk_before_the_catalog_refers_to_them(
    runner: CrashRunner, origin: Path, copy: Callable[..., Path], name: str, change: dict[str, Any]
) -> None:
    """A kill does not show a forgotten sync, a power cut would; so the order of the calls is looked at."""
    done = runner.run(store=str(copy()), **change)
    synced: set[str] = set()
    waiting: set[str] = set()
    renamed = 0
    for event, *paths in (point.split(" ") for point in done["points"]):
        if event == "fsync":
            synced.add(paths[0])
            waiting.discard(paths[0])
        elif event == "open":
            synced.discard(paths[0])
        elif event == "os.mkdir" and (origin / paths[0][1:]).exists():
            continue  # an attempt that failed
        elif event in ("os.rename", "os.mkdir") and paths[0].startswith("/domains/"):
            waiting.add(paths[-1].rpartition("/")[0])
            if event == "os.rename":
                assert paths[0] in synced, f"{paths[0]} was renamed before it was synced"
                renamed += 1
        elif event == "before":
            assert not waiting, f"the entries of {waiting} were not synced before the commit"
    assert renamed
