"""What a build leaves on disk when it is killed, and what the next one takes from there."""

import errno
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmi_engine.construct.build_folder import BuildFolder, RowWriter
from hmi_engine.construct.table_plan import TablePlan
from hmi_engine.errors import StoreBusyError, StoreError, StoreFullError
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.locks import FolderLock
from hmi_engine.knowledge.plot_table import PlotMetadata

NUM_ROWS = 10
SHAPES = {"rows": (torch.int8, (NUM_ROWS, 2, 4)), "row_scales": (torch.float32, (NUM_ROWS, 2))}


def random_rows(seed: int = 0, num_rows: int = NUM_ROWS) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "rows": torch.randint(-127, 128, (num_rows, 2, 4), generator=generator, dtype=torch.int8),
        "row_scales": torch.randn(num_rows, 2, generator=generator),
    }


def part(rows: dict[str, torch.Tensor], start: int, end: int) -> dict[str, torch.Tensor]:
    return {name: tensor[start:end] for name, tensor in rows.items()}


def plan(seed: int = 0) -> TablePlan:
    generator = torch.Generator().manual_seed(seed)
    lengths = {"keys": 10, "counts": 10, "candidate_keys": 3, "candidate_counts": 3, "documents": 0}
    metadata = PlotMetadata(
        family="bert",
        window=2,
        plot_layers=2,
        hidden_size=4,
        placeholder_token_id=4,
        vocab_size=50,
        row_dtype="float32",
        row_format="int8",
        layer_identity="layers",
        corpus_tokens=1000,
        min_count=2,
        admission_count=3,
        occurrence_weight=1.25,
    )
    tensors = {
        name: torch.randint(-(2**62), 2**62, (length,), generator=generator)
        for name, length in lengths.items()
    }
    return TablePlan(
        **tensors, metadata=metadata, statistics={"hit_mass": 1 / 3, "nested": {"texts": [1, 2]}}
    )


def assert_same_plan(found: TablePlan | None, expected: TablePlan) -> None:
    assert found is not None
    for name in ("keys", "counts", "candidate_keys", "candidate_counts", "documents"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert (found.metadata, found.statistics) == (expected.metadata, expected.statistics)


@pytest.fixture
def layout(tmp_path: Path) -> StoreLayout:
    return StoreLayout(tmp_path / "store")


@pytest.fixture
def folder(layout: StoreLayout) -> Iterator[BuildFolder]:
    with BuildFolder.open(layout, "acme/words") as opened:
        yield opened


def test_a_plan_is_found_again_with_its_rows_and_codebooks(layout: StoreLayout) -> None:
    rows, codebooks = random_rows(), torch.randn(2, 1, 256, 4).half()
    with BuildFolder.open(layout, "words") as first:
        assert first.load("fingerprint") is None
        first.save(plan(), "fingerprint")
        assert first.codebooks is None
        first.codebooks = codebooks
        first.rows(SHAPES).append(part(rows, 0, 4))
    with BuildFolder.open(layout, "words") as second:
        assert_same_plan(second.load("fingerprint"), plan())
        assert second.codebooks is not None and torch.equal(second.codebooks, codebooks)
        writer = second.rows(SHAPES)
        assert writer.done == 4
        with pytest.raises(RuntimeError, match="4 of 10 rows"):
            writer.tensors()
        writer.append(part(rows, 4, 10))
        tensors = writer.tensors()
        second.remove()
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
            name: tensor.tolist() for name, tensor in rows.items()
        }
    assert list(layout.builds.iterdir()) == []


@pytest.mark.parametrize("change", ["fingerprint", "new plan", "cut plan", "no plan"])
def test_rows_of_another_plan_are_never_used(layout: StoreLayout, change: str) -> None:
    with BuildFolder.open(layout, "words") as first:
        first.save(plan(), "one")
        first.codebooks = torch.zeros(2, 1, 256, 4).half()
        first.rows(SHAPES).append(part(random_rows(), 0, 4))
    with BuildFolder.open(layout, "words") as second:
        file = second.path / "plan.safetensors"
        if change == "cut plan":
            file.write_bytes(file.read_bytes()[:-8])
        if change == "no plan":
            file.unlink()
        if change == "new plan":
            second.save(plan(1), "one")
            assert_same_plan(second.load("one"), plan(1))
        else:
            assert second.load("two" if change == "fingerprint" else "one") is None
            assert [path.name for path in second.path.iterdir()] == ["lock"]
        assert second.codebooks is None
        assert second.rows(SHAPES).done == 0


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batches=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    damage=st.sampled_from(["cut", "zeros", "garbage", "grown"]),
    file=st.sampled_from(["rows.rows", "row_scales.rows", "batches.log"]),
    place=st.floats(0, 1, exclude_max=True),
)
def test_after_a_power_cut_whole_sound_batches_are_left(
    tmp_path_factory: pytest.TempPathFactory, batches: list[int], damage: str, file: str, place: float
) -> None:
    """Whatever happens to the end of a file, ``done`` is the end of the last batch before it."""
    path = tmp_path_factory.mktemp("rows")
    total = sum(batches)
    rows = random_rows(num_rows=total)
    shapes = {name: (dtype, (total, *shape[1:])) for name, (dtype, shape) in SHAPES.items()}
    writer, ends = RowWriter(path, shapes), [0]
    for size in batches:
        writer.append(part(rows, ends[-1], ends[-1] + size))
        ends.append(writer.done)
    content = bytearray((path / file).read_bytes())
    start = int(place * len(content))
    if damage == "cut":
        content = content[:start]
    elif damage == "grown":
        content, start = content + bytes(20), len(content)
    else:
        # Different bytes, as equal ones are no damage.
        content[start:] = bytes(
            0 if damage == "zeros" and byte else (byte + 1) % 256 for byte in content[start:]
        )
    (path / file).write_bytes(content)
    resumed = RowWriter(path, shapes)
    record_bytes = 12
    row_bytes = {"rows.rows": 8, "row_scales.rows": 8, "batches.log": record_bytes}[file]
    sound = [
        end
        for count, end in enumerate(ends)
        if (count if file == "batches.log" else end) * row_bytes <= start
    ]
    assert resumed.done == sound[-1]
    if resumed.done < total:
        resumed.append(part(rows, resumed.done, total))
    assert all(torch.equal(resumed.tensors()[name], rows[name]) for name in rows)
    assert RowWriter(path, shapes).done == total


def test_batches_that_do_not_fit_are_refused(folder: BuildFolder) -> None:
    folder.save(plan(), "f")
    writer, rows = folder.rows(SHAPES), random_rows(num_rows=12)
    for wrong in (
        {"rows": rows["rows"]},
        rows | {"rows": rows["rows"].short()},
        rows | {"rows": rows["rows"][:, :1]},
        rows | {"rows": rows["rows"][:3]},
        rows,
        part(rows, 0, 0),
    ):
        with pytest.raises(ValueError, match="rows"):
            writer.append(wrong)
    assert writer.done == 0
    with pytest.raises(ValueError, match="same number of rows"):
        folder.rows(SHAPES | {"row_scales": (torch.float32, (3, 2))})


def test_a_table_without_rows_is_done_at_once(folder: BuildFolder) -> None:
    writer = folder.rows({"rows": (torch.float16, (0, 2, 4))})
    assert writer.done == writer.num_rows == 0
    assert writer.tensors()["rows"].shape == (0, 2, 4)


def test_a_folder_with_nothing_to_go_on_from_is_removed(layout: StoreLayout) -> None:
    with pytest.raises(KeyError), BuildFolder.open(layout, "words"):
        raise KeyError("the corpus could not be read")
    assert list(layout.builds.iterdir()) == []


def test_names_never_become_paths(layout: StoreLayout) -> None:
    with BuildFolder.open(layout, "../../up") as first, BuildFolder.open(layout, "acme/words") as second:
        assert {first.path.parent, second.path.parent} == {layout.builds}
        assert first.path != second.path
        assert FolderLock.description(second.path) == "acme/words"


def test_a_build_goes_on_when_there_is_room_again(folder: BuildFolder) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    folder.save(plan(), "f")
    rows, writer = random_rows(), folder.rows(SHAPES)
    writer.append(part(rows, 0, 5))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60, limits[1]))
        with pytest.raises(StoreFullError, match="5 of 10 rows are done"):
            writer.append(part(rows, 5, 10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert folder.rows(SHAPES).done == 5
    writer.append(part(rows, 5, 10))
    assert torch.equal(writer.tensors()["rows"], rows["rows"])


def test_one_builds_and_another_hears_of_it(layout: StoreLayout, folder: BuildFolder) -> None:
    with pytest.raises(StoreBusyError, match="building domain 'acme/words'"):
        BuildFolder.open(layout, "acme/words")
    assert FolderLock.is_held(folder.path)
    with BuildFolder.open(layout, "other"):
        pass
    folder.close()
    assert not FolderLock.is_held(folder.path)
    with BuildFolder.open(layout, "acme/words") as after:
        folder.remove()  # of a lock given back: the folder is another's now
        assert FolderLock.is_held(after.path)


def test_a_dead_process_holds_no_lock(layout: StoreLayout) -> None:
    program = (
        "import sys, time; from pathlib import Path\n"
        "from hmi_engine.construct.build_folder import BuildFolder\n"
        "from hmi_engine.knowledge.layout import StoreLayout\n"
        "BuildFolder.open(StoreLayout(Path(sys.argv[1])), 'words'); print('locked', flush=True)\n"
        "time.sleep(60)"
    )
    command = [sys.executable, "-c", program, str(layout.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path.cwd()) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == b"locked\n"
            with pytest.raises(StoreBusyError):
                BuildFolder.open(layout, "words")
        finally:
            child.kill()
    with BuildFolder.open(layout, "words") as after:
        assert FolderLock.is_held(after.path)


def test_many_threads_share_a_folder_one_after_the_other(layout: StoreLayout) -> None:
    """Each either has the folder alone or hears that it is busy, while folders come and go under them."""
    inside, most, failures = [0], [0], []

    def work() -> None:
        for _ in range(20):
            try:
                with BuildFolder.open(layout, "words") as opened:
                    inside[0] += 1
                    most[0] = max(most[0], inside[0])
                    opened.save(plan(), "f")
                    inside[0] -= 1
                    opened.remove()
            except StoreBusyError:
                continue
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and most[0] == 1
    assert list(layout.builds.iterdir()) == []


def test_a_folder_that_goes_while_it_is_made(tmp_path: Path, monkeypatch) -> None:
    """``mkdir`` finds it, and when it looks whether it is a folder, its last user has removed it."""
    make, gone = Path.mkdir, []

    def mkdir(self: Path, *arguments: object, **options: object) -> None:
        if not gone:
            gone.append(self)
            raise FileExistsError(errno.EEXIST, "File exists", str(self))
        make(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    FolderLock(tmp_path / "folder", busy="busy").release()
    assert gone == [tmp_path / "folder"] and not FolderLock.is_held(tmp_path / "folder")


def test_a_file_in_a_folders_place_is_no_wait(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file")
    with pytest.raises(StoreError, match="folder") as raised:
        FolderLock(tmp_path / "folder", busy="busy")
    assert not isinstance(raised.value, StoreBusyError)
