"""Commands for stores of many tenants, as a person types them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.command_line import hmi

import hmi_engine as engine
from hmi_engine.cli import output
from hmi_engine.knowledge import verification
from hmi_engine.knowledge.changes import NewTenant
from hmi_engine.knowledge.heads import ClassificationHead

NUM_TENANTS = 130


@pytest.fixture(scope="module")
def origin(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "store"
    with engine.Store.create(path, general=tiny_bert, plot_layers=2) as store:
        size = store.general.hidden_size
        head = ClassificationHead(("no", "yes"), torch.ones(2, size), torch.zeros(2), "cls")
        store.add_tenants(
            NewTenant(
                f"{'acme' if number % 2 else 'beta'}/t{number:03d}", "general", engine.Adapter({}), head
            )
            for number in range(NUM_TENANTS)
        )
    return path


def names(*options: object) -> list[str]:
    done = hmi("tenant", "list", *options, "--json")
    assert done.returncode == 0, done.stderr
    return [tenant["name"] for tenant in json.loads(done.stdout)]


def test_lists_are_cut_and_filtered(origin: Path) -> None:
    acme = [f"acme/t{number:03d}" for number in range(1, NUM_TENANTS, 2)]
    beta = [f"beta/t{number:03d}" for number in range(0, NUM_TENANTS, 2)]
    assert names(origin) == acme + beta
    assert names(origin, "--limit", 3) == acme[:3]
    assert names(origin, "--prefix", "beta/", "--limit", 2) == beta[:2]
    assert names(origin, "--prefix", "acme/t00") == acme[:5]
    assert names(origin, "--prefix", "\udcff") == names(origin, "--prefix", "nobody") == []
    shown = hmi("tenant", "list", origin, "--prefix", "beta").stdout
    assert all(name in shown for name in beta) and "acme" not in shown and "more" not in shown
    assert "30 more" in hmi("tenant", "list", origin).stdout
    assert "60 more" in hmi("tenant", "list", origin, "--prefix", "acme/", "--limit", 5).stdout
    assert hmi("tenant", "list", origin, "--limit", 0).returncode == 2


def test_a_streamed_list_is_the_json_that_a_whole_one_would_be(capsys: pytest.CaptureFixture[str]) -> None:
    for values in ([], [{}], [{"a": [1, {"b": "line\nbreak ü"}]}, 3, [], "x"]):
        output.print_json_list(iter(values))
        streamed = capsys.readouterr().out
        output.print_json(values)
        assert streamed == capsys.readouterr().out


def test_pins_are_set_shown_and_taken_off(origin: Path) -> None:
    done = hmi("tenant", "pin", origin, "beta/t004", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["pinned"] is True
    assert "is pinned" in hmi("tenant", "pin", origin, "acme/t001").stdout
    assert names(origin, "--pinned") == ["acme/t001", "beta/t004"]
    assert names(origin, "--pinned", "--prefix", "beta") == ["beta/t004"]
    assert hmi("tenant", "list", origin, "--prefix", "acme/t00").stdout.count("yes") == 1
    with engine.Store.open(origin, read_only=True) as store:
        assert [info.name for info in store.tenants.values() if info.pinned] == ["acme/t001", "beta/t004"]
    assert "is not pinned" in hmi("tenant", "pin", origin, "acme/t001", "--off").stdout
    assert hmi("tenant", "pin", origin, "beta/t004", "--off").returncode == 0
    assert names(origin, "--pinned") == []
    unknown = hmi("tenant", "pin", origin, "beta/t04")
    assert unknown.returncode == 2 and "did you mean" in unknown.stderr


def test_garbage_is_collected(origin: Path) -> None:
    stray = origin / "tenants" / "aa" / "9999.9999.safetensors"
    stray.parent.mkdir(exist_ok=True)
    stray.write_bytes(b"left by a crash")
    done = hmi("gc", origin, "--json")
    assert json.loads(done.stdout) == {"removed": [str(stray)]} and not stray.exists()
    assert "removed 0 files" in hmi("gc", origin).stdout
    assert hmi("verify", origin).returncode == 0


def test_verification_shows_how_far_it_is(origin: Path) -> None:
    done = hmi("verify", origin)
    assert done.returncode == 0 and "sound" in done.stdout
    assert "checking files" in done.stderr
    # Tenants, the one domain, and the files of the base model.
    with engine.Store.open(origin, read_only=True) as store:
        total = NUM_TENANTS + 1 + len(store.catalog.general_files())
    assert f"{total}/{total}" in done.stderr


def test_an_interrupted_verification_ends_without_a_traceback(
    origin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = verification.tenant_problems
    interrupted = iter([True])

    def interrupt(*arguments: object, **options: object) -> object:
        if next(interrupted, False):
            signal.raise_signal(signal.SIGINT)  # from a worker; Python gives it to the main thread
        return check(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(verification, "tenant_problems", interrupt)
    # Whoever starts tests in the background has them ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = hmi("verify", origin)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.returncode not in (0, 2) and "Traceback" not in done.stderr
    monkeypatch.undo()
    assert hmi("verify", origin).returncode == 0


def test_a_list_into_a_closed_pipe_ends_quietly(origin: Path) -> None:
    code = f"import sys; sys.argv = ['hmi', 'tenant', 'list', '{origin}', '--json']; "
    code += "from hmi_engine.cli import main; main()"
    command = f'{sys.executable} -c "{code}" | head -1'
    environment = os.environ | {"PYTHONPATH": str(Path(engine.__file__).parents[1])}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "[\n" and "Traceback" not in done.stderr
