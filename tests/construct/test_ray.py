"""A domain that is counted and computed on a local Ray cluster is, bit for bit, that of one machine."""

import builtins
import io
import sys
from pathlib import Path

import pytest
import torch
from conftest import sentences, write_jsonl
from typer.testing import CliRunner

from hmi_engine.cli import app
from hmi_engine.construct import materialise
from hmi_engine.construct.counting import CorpusCounts, merge_counts
from hmi_engine.construct.domain_corpus import CorpusSource
from hmi_engine.construct.ray_counting import _parts, _Sum
from hmi_engine.errors import CorpusError, MissingDependencyError


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two CPUs on this machine."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray", reason="the `ray` extra is not installed")
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield "auto"
    ray.shutdown()
    patch.undo()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of files with a bad line, a byte that is no UTF-8, and a file without text."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = sentences(900, seed=3)
    (folder / "a.txt").write_bytes("\n".join(texts[:300]).encode() + b"\nthe cell \xff binds\n")
    write_jsonl(folder / "b.jsonl", [{"text": text} for text in texts[250:600]] + [{"other": 1}])
    (folder / "c.txt").write_text("\n".join(texts[600:]))
    (folder / "empty.txt").write_text("\n\n")
    return folder


def both(make_store, corpus, cluster: str, **settings):
    """The same domain made on one machine and on the cluster: reports and descriptions."""
    made = []
    for address in (None, cluster):
        store = make_store(window=settings.get("window", 2))
        store.add_domain("parent", sentences(60, seed=9), plot_bytes="64KiB")
        options = {name: value for name, value in settings.items() if name != "window"}
        report = store.add_domain("words", corpus(), parent="parent", ray=address, **options)
        made.append((report, store.domains["words"]))
    return made


@pytest.fixture
def threads():
    """Sets how many threads one machine computes with."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(("window", "row_format"), [(2, "float32"), (3, "int8"), (2, "pq8")])
def test_files_give_the_same_table(
    make_store, files, cluster, monkeypatch, threads, window, row_format, num_threads
):
    threads(num_threads)  # with one, the cluster has two workers
    monkeypatch.setattr(materialise, "WINDOWS_PER_BATCH", 100)  # several batches, on their way at once
    (here_report, here), (report, there) = both(
        make_store, lambda: files, cluster, window=window, row_format=row_format, plot_bytes="1MiB"
    )
    assert here.rows > 300
    assert there.sha256 == here.sha256
    assert report == here_report
    assert (report.num_bad_lines, report.num_replaced) == (1, 1)


@pytest.mark.slow
def test_a_budget_cuts_the_same_rows(make_store, files, cluster):
    (_, here), (_, there) = both(make_store, lambda: files, cluster, plot_bytes="40KiB")
    assert 0 < here.rows < 300
    assert there.sha256 == here.sha256


@pytest.mark.slow
def test_texts_of_an_iterator_give_the_same_table(make_store, files, cluster, monkeypatch):
    monkeypatch.setattr("hmi_engine.construct.ray_counting.TEXTS_PER_PART", 128)
    (here_report, here), (report, there) = both(
        make_store, lambda: iter([*sentences(500, seed=4), files / "a.txt"]), cluster, plot_bytes="1MiB"
    )
    assert there.sha256 == here.sha256
    assert report == here_report


@pytest.mark.slow
def test_the_command_takes_an_address(make_store, files, cluster):
    store, expected = make_store(), make_store()
    expected.add_domain("words", files)
    arguments = ["domain", "add", str(store.layout.root), "words", "--corpus", str(files), "--ray", cluster]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert store.domains["words"].sha256 == expected.domains["words"].sha256


@pytest.mark.slow
def test_what_is_wrong_is_said_as_on_one_machine(make_store, files, cluster, tmp_path):
    store = make_store()
    with pytest.raises(CorpusError, match="no text"):
        store.add_domain("words", files / "empty.txt", ray=cluster)
    broken = tmp_path / "broken.txt.gz"
    broken.write_bytes(b"this is no gzip file")
    with pytest.raises(CorpusError, match=r"broken\.txt\.gz"):
        store.add_domain("words", broken, ray=cluster)
    assert "words" not in store.domains


def test_without_ray_the_error_says_what_to_install(make_store, monkeypatch):
    real_import = builtins.__import__

    def without_ray(name, *rest, **named):
        if name.split(".")[0] == "ray":
            raise ImportError(name)
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    store = make_store()
    with pytest.raises(MissingDependencyError, match=r"hmi\[ray\]"):
        store.add_domain("words", ["the cell"], ray="auto")
    assert "words" not in store.domains


def test_counts_are_added_up_in_any_order():
    generator = torch.Generator().manual_seed(0)
    parts = []
    for size in (40, 3, 0, 17, 17, 90, 1):
        keys = torch.randint(1, 120, (size,), generator=generator).unique()
        counts = torch.randint(1, 9, (len(keys),), generator=generator)
        parts.append(CorpusCounts(keys, counts, int(counts.sum()), len(keys), 1, 5, keys[:2]))
    expected = parts[0]
    for part in parts[1:]:
        expected = merge_counts(expected, part)
    for order in (parts, parts[::-1], parts[3:] + parts[:3]):
        total = _Sum()
        for part in order:
            total.add(part)
        added = total.take()
        assert torch.equal(added.keys, expected.keys)
        assert torch.equal(added.counts, expected.counts)
        assert torch.equal(added.documents, expected.documents)
        assert added.total_occurrences == expected.total_occurrences


def test_standard_input_is_read_as_it_was_told(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"body": "one"}\n{"text": "two"}\n')))
    source = CorpusSource("-", text_field="body", stdin_format="jsonl")
    assert list(_parts(source)) == [{"file": "", "texts": '["one"]'}]
    assert source.report.num_bad_lines == 1
