"""The command line as a person types it."""

import importlib.metadata
import json
import subprocess
import sys

import pytest
from cli.command_line import hmi
from conftest import write_jsonl


@pytest.fixture(scope="module")
def made(tiny_bert, tmp_path_factory, corpus):
    """A store made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    store = folder / "store"
    corpus_file = write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in corpus])
    with corpus_file.open("a") as file:
        file.write("{broken\n")
    examples = [{"text": text, "label": "cells" if "cell" in text.split() else "none"} for text in corpus]
    data = write_jsonl(folder / "train.jsonl", examples)
    created = hmi("init", store, "--general", tiny_bert, "--plot-layers", 2, "--json")
    assert created.returncode == 0, created.stderr
    assert json.loads(created.stdout)["general"]["plot_layers"] == 2
    added = hmi("domain", "add", store, "words", "--corpus", corpus_file, "--json")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["bad_lines"] == 1
    assert f"{corpus_file}:{len(corpus) + 1}" in added.stderr.replace(", line ", ":")
    trained = hmi(
        "tenant", "train", store, "acme/cells", "--data", data, "--domain", "words", "--epochs", 2, "--json"
    )
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["labels"] == ["cells", "none"]
    return store


def test_run_answers_line_by_line(made):
    lines = [
        json.dumps({"tenant": "acme/cells", "text": "the cell is small", "id": 1}),
        "",
        "no json",
        "[1]",
        json.dumps({"text": "no tenant"}),
        json.dumps({"tenant": "acme/cell", "text": "x"}),
        json.dumps({"tenant": "acme/cells", "text": "a", "color": "red"}),
        json.dumps({"tenant": "acme/cells", "text": "the gene"}),
    ]
    done = hmi("run", made, text="\n".join(lines))
    assert done.returncode == 0
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 7
    assert set(answers[0]["scores"]) == {"cells", "none"} and answers[0]["id"] == 1
    assert "line 3" in answers[1]["error"]["message"] and "line 4" in answers[2]["error"]["message"]
    assert "tenant" in answers[3]["error"]["message"]
    assert answers[4]["error"]["type"] == "UnknownTenantError"
    assert "'acme/cells'" in answers[4]["error"]["message"], "a suggestion"
    assert "color" in answers[5]["error"]["message"]
    assert "error" not in answers[6]
    assert "5 of 7" in done.stderr


BAD_LINES = {
    b'{"tenant": "acme/cells", "text": "a", "id": ' + b"9" * 5000 + b"}": "no JSON that can be read",
    b"[" * 100_000: "inside each other",
    b'{"tenant": "acme/cells", "text": "a\xff"}': "no UTF-8: invalid start byte at byte 36",
    b'{"tenant": "acme/cells", "text": "a \\ud800"}': "surrogate",
    b'{"tenant": "acme/cells", "text": "a", "id": {"x": "\\udc00"}}': "surrogate",
    b'{"tenant": "t\\ud800", "text": "a"}': "surrogate",
    b'{"tenant": "acme/cells", "input_ids": 5}': "input_ids must be a list",
    b'{"tenant": "acme/cells", "input_ids": {"5": 6}}': "input_ids must be a list",
}


def test_run_answers_lines_beside_those_that_nobody_can_read(made):
    good = json.dumps({"tenant": "acme/cells", "text": "the cell is \U0001f600", "id": "\U0001f600"}).encode()
    done = hmi("run", made, text=b"\n".join([good, *(line + b"\n" + good for line in BAD_LINES)]))
    assert done.returncode == 0
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers[::2] == [answers[0]] * (len(BAD_LINES) + 1) and answers[0]["id"] == "\U0001f600"
    for answer, said in zip(answers[1::2], BAD_LINES.values(), strict=True):
        assert answer["error"]["type"] == "InvalidRequestError" and said in answer["error"]["message"]


def test_run_with_memory_of_its_own_a_pipeline_and_a_trace(made, tmp_path):
    lines = [json.dumps({"tenant": "acme/cells", "text": text}) for text in ("the cell", "a gene")] * 5
    options = ["--device-memory", "1MiB", "--host-memory", "1MiB", "--max-batch-tokens", 8]
    plain = hmi("run", made, text="\n".join(lines))
    trace = tmp_path / "trace.json"
    done = hmi("run", made, *options, "--pipeline-depth", 3, "--trace", trace, text="\n".join(lines))
    assert done.returncode == 0 and done.stdout == plain.stdout
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"fetch", "search", "compute"} <= names
    small = hmi("run", made, "--device-memory", "1KiB", text=lines[0])
    assert "device_memory" in json.loads(small.stdout)["error"]["message"]
    assert hmi("run", made, "--device-memory", "lots", text=lines[0]).returncode == 2
    assert hmi("run", made, "--pipeline-depth", 0, text=lines[0]).returncode == 2


def test_exact_mode_runs(made):
    done = hmi("run", made, "--miss", "exact", text='{"tenant": "acme/cells", "text": "the cell"}\n')
    assert done.returncode == 0 and "scores" in json.loads(done.stdout)


def test_version():
    shown = hmi("--version")
    assert shown.returncode == 0 and shown.stdout == f"hmi {importlib.metadata.version('hmi')}\n"


def test_lists_and_verify(made):
    tenants = json.loads(hmi("tenant", "list", made, "--json").stdout)
    assert [tenant["name"] for tenant in tenants] == ["acme/cells"]
    assert tenants[0]["card"]["training"]["settings"]["miss"] == "backoff"
    domains = json.loads(hmi("domain", "list", made, "--json").stdout)
    assert {domain["name"]: domain["parent"] for domain in domains} == {"general": None, "words": "general"}
    assert "acme/cells" in hmi("tenant", "list", made).stdout
    assert "words" in hmi("domain", "list", made).stdout
    assert json.loads(hmi("verify", made, "--json").stdout)["problems"] == []


def test_verify_finds_and_repairs(made):
    orphan = made / "tenants" / "aa" / "999.999.safetensors"
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"left by a crash")
    found = hmi("verify", made)
    assert found.returncode == 1 and "orphan" in found.stdout
    assert hmi("verify", made, "--repair").returncode == 0
    assert not orphan.exists()


def test_a_file_decides_nothing_of_what_the_terminal_shows(made, tmp_path):
    orphan = made / "tenants" / "aa" / "[/bold]\x1b[2J999.safetensors"
    orphan.parent.mkdir(parents=True, exist_ok=True)
    orphan.write_bytes(b"left by a crash")
    for found in (hmi("verify", made), hmi("verify", made, "--repair")):
        assert "[/bold]" in found.stdout and "\x1b[2J" not in found.stdout
    assert not orphan.exists()
    failed = hmi("domain", "add", made, "more", "--corpus", tmp_path / "\x1b[2J")
    assert failed.returncode == 2 and r"\x1b[2J" in failed.stderr and "\x1b[2J" not in failed.stderr


def test_remove(made, tiny_bert):
    assert hmi("domain", "remove", made, "words").returncode == 2, "it has a tenant"
    trained = made.parent / "train.jsonl"
    hmi("tenant", "train", made, "short", "--data", trained, "--epochs", 1)
    assert json.loads(hmi("tenant", "remove", made, "short", "--json").stdout) == {"removed": "short"}
    assert "short" not in hmi("tenant", "list", made).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["verify", "{folder}/nothing"], "hmi init"),
        (["init", "{store}", "--general", "{bert}"], "exists"),
        (["init", "{folder}/new", "--general", "{folder}/no-model"], "no-model"),
        (["domain", "add", "{store}", "../x", "--corpus", "{folder}/corpus.jsonl"], "name"),
        (["domain", "add", "{store}", "words", "--corpus", "{folder}/corpus.jsonl"], "words"),
        (["domain", "add", "{store}", "other", "--corpus", "{folder}/none.jsonl"], "none.jsonl"),
        (["domain", "add", "{store}", "other", "--corpus", "{folder}/corpus.jsonl", "--parent", "no"], "no"),
        (["domain", "add", "{store}", "o", "--corpus", "{folder}/corpus.jsonl", "--plot-bytes", "x"], "'x'"),
        (["domain", "remove", "{store}", "general"], "root"),
        (["tenant", "remove", "{store}", "nobody"], "nobody"),
        (["tenant", "add", "{store}", "t", "--peft", "{folder}"], "adapter_config.json"),
        (["tenant", "train", "{store}", "t", "--data", "{folder}/corpus.jsonl"], "label"),
        (["tenant", "train", "{store}", "acme/cells", "--data", "{folder}/train.jsonl"], "replace"),
        (["tenant", "train", "{store}", "t", "--data", "{folder}/train.jsonl", "--kind", "magic"], "kind"),
        (["run", "{store}", "--miss", "guess"], "miss"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(made, tiny_bert, arguments, said):
    folder = made.parent
    done = hmi(*[argument.format(folder=folder, store=made, bert=tiny_bert) for argument in arguments])
    assert done.returncode == 2, done
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_says_why():
    report = json.loads(hmi("doctor", "--json").stdout)
    assert set(report) == {"Versions", "Kernels", "Backends", "Machine"}
    assert report["Versions"]["faiss-cpu"] == importlib.metadata.version("faiss-cpu")
    for name in ("cuda", "triton"):
        assert report["Backends"][name].startswith("off: ") or report["Backends"][name] == "on"
    assert "Kernels" in hmi("doctor").stdout


def test_nothing_loads_transformers_before_it_is_needed():
    """Importing it takes longer than all the rest together, and ``hmi --help`` would wait for it."""
    code = "import sys, hmi_engine.cli; print(sorted({'transformers', 'peft', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_in_a_process_of_its_own(made):
    """The script that pip installs, with a real standard input and a reader that goes away."""
    command = [sys.executable, "-c", "from hmi_engine.cli import main; main()", "run", str(made)]
    line = '{"tenant": "acme/cells", "text": "the cell"}\n'
    done = subprocess.run(command, input=line * 3, capture_output=True, text=True, check=True)
    assert [json.loads(answer)["tenant"] for answer in done.stdout.splitlines()] == ["acme/cells"] * 3
    wrong = subprocess.run([*command[:-2], "verify", "/nothing"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "Traceback" not in wrong.stderr
    piped = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    piped.stdout.close()
    _, errors = piped.communicate((line * 2000).encode())
    assert b"Traceback" not in errors
