"""``hmi distill``, and what ``hmi init`` takes of it."""

import json
from pathlib import Path

import pytest
from cli.command_line import hmi
from conftest import write_jsonl

SMALL = ("--steps-1", 2, "--steps-2", 2, "--batch-tokens", 128, "--max-tokens", 16)


@pytest.fixture(scope="module")
def distilled(tiny_bert: Path, tmp_path_factory, corpus: list[str]):
    """A folder with a store that was distilled, its corpus, its export and compact form, and the report."""
    folder = tmp_path_factory.mktemp("distill")
    text = write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in corpus])
    made = hmi("init", folder / "store", "--general", tiny_bert, "--plot-layers", 2, "--json")
    assert made.returncode == 0, made.stderr
    done = hmi(
        "distill",
        folder / "store",
        "--corpus",
        text,
        "--work",
        folder / "work",
        "--export",
        folder / "export",
        "--compact",
        folder / "compact.safetensors",
        *SMALL,
        "--json",
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_the_report_is_json(distilled):
    folder, report = distilled
    assert [len(stage["losses"]) for stage in report["stages"]] == [2, 2]
    assert report["plot_layers"] == 2 and report["texts"] > 100
    assert json.loads((folder / "export" / "distillation.json").read_text()) == report
    assert hmi("verify", folder / "store").returncode == 0


def test_init_takes_the_export_and_the_compact_form(distilled, tiny_bert, tmp_path):
    folder, _ = distilled
    export = hmi("init", tmp_path / "a", "--general", folder / "export", "--json")
    compact = hmi(
        "init",
        tmp_path / "b",
        "--general",
        tiny_bert,
        "--distilled",
        folder / "compact.safetensors",
        "--json",
    )
    for done in (export, compact):
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["general"]["plot_layers"] == 2
    other = hmi("init", tmp_path / "c", "--general", folder / "export", "--plot-layers", 0)
    assert other.returncode == 2 and "distilled for plot_layers=2" in other.stderr


def test_init_takes_the_form_that_comes_along(tmp_path):
    for plot_layers in (2, 0):
        store = tmp_path / f"store-{plot_layers}"
        done = hmi("init", store, "--packaged", "--plot-layers", plot_layers, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["general"]["plot_layers"] == plot_layers
    for arguments, said in (
        (("--packaged", "--plot-layers", 5), "only with 2, 3, 4"),
        (("--packaged", "--general", tmp_path), "leave out --general"),
        ((), "--packaged"),
    ):
        refused = hmi("init", tmp_path / "other", *arguments)
        assert refused.returncode == 2 and said in refused.stderr, refused
    assert not (tmp_path / "other").exists()


def test_lines_that_are_left_out_are_told_of(tiny_bert, tmp_path, corpus):
    made = hmi("init", tmp_path / "store", "--general", tiny_bert, "--plot-layers", 2)
    assert made.returncode == 0, made.stderr
    lines = "\n".join(json.dumps({"text": text}) for text in corpus)
    done = hmi(
        "distill",
        tmp_path / "store",
        "--corpus",
        "-",
        "--stdin-format",
        "jsonl",
        *SMALL,
        "--json",
        text=lines + '\n{"other": "the cell"}\n',
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["texts"] > 100
    assert f"left out: -:{len(corpus) + 1}: no string in field 'text'" in done.stderr


def test_bad_input_is_one_line(distilled, tmp_path):
    folder, _ = distilled
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for arguments, message in [
        (["--corpus", empty], "holds no text"),
        (["--corpus", tmp_path / "none.txt"], "does not exist"),
        (["--corpus", folder / "corpus.jsonl", "--domain", "nobody"], "nobody"),
        (["--corpus", folder / "corpus.jsonl", "--mixed-precision", "fp8"], "mixed_precision"),
        (["--corpus", folder / "corpus.jsonl", "--steps-1", 0, "--steps-2", 0], "0 steps"),
        (["--corpus", folder / "corpus.jsonl", "--domain", "general", "--steps-1", 0], "--steps-1"),
        (["--corpus", folder / "corpus.jsonl", "--seed", -1], "--seed"),
        (["--corpus", "-", "--stdin-format", "json"], "--stdin-format"),
    ]:
        done = hmi("distill", folder / "store", *arguments)
        assert done.returncode == 2, (arguments, done.stderr)
        assert message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
