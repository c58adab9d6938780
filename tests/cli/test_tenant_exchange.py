"""``hmi tenant import`` and ``export`` from the command line, on folders that AdapterHub's library wrote."""

import json

import pytest
from cli.command_line import hmi

import hmi_engine as hmi_package
from benchmarks.parity_cases import RECORDED


@pytest.fixture(scope="module")
def exchange_store(tmp_path_factory):
    """Folder of a store with K = 2."""
    path = tmp_path_factory.mktemp("cli") / "store"
    hmi_package.Store.create(path, general=RECORDED / "base", plot_layers=2).close()
    return path


def test_a_folder_goes_in_and_out_and_in_again(exchange_store, tmp_path):
    store = str(exchange_store)
    done = hmi("tenant", "import", store, "acme/a", "--adapter", str(RECORDED / "seq_bn_upper"), "--json")
    described = json.loads(done.stdout)
    assert (described["kind"], described["labels"]) == ("bottleneck", ["no", "yes", "maybe"])
    done = hmi("tenant", "export", store, "acme/a", str(tmp_path), "--format", "adapterhub", "--json")
    assert json.loads(done.stdout)["format"] == "adapterhub"
    done = hmi("tenant", "import", store, "acme/b", "--adapter", str(tmp_path))
    assert "bottleneck of rank 4, 3 labels" in done.stdout
    with hmi_package.Store.open(exchange_store, read_only=True) as opened:
        first, second = opened.tenants["acme/a"], opened.tenants["acme/b"]
        assert first.sha256 == second.sha256


def test_peft_folders_by_both_commands(exchange_store, tmp_path):
    store, out = str(exchange_store), tmp_path / "peft"
    lora = ["--adapter", str(RECORDED / "static_head"), "--drop-lower-layers", "--labels", "x,y,z"]
    done = hmi("tenant", "import", store, "lora", *lora)
    assert "were dropped" in done.stderr
    hmi("tenant", "export", store, "lora", str(out))
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "LORA"
    for name, command in (("again", ["import", "--adapter"]), ("added", ["add", "--peft"])):
        done = hmi("tenant", command[0], store, name, command[1], str(out), "--json")
        assert json.loads(done.stdout)["labels"] == ["x", "y", "z"], done


def test_a_head_from_a_folder_of_its_own(exchange_store, tmp_path):
    without = tmp_path / "adapter"
    hmi("tenant", "import", str(exchange_store), "whole", "--adapter", str(RECORDED / "seq_bn_upper"))
    done = hmi(
        "tenant",
        "export",
        str(exchange_store),
        "whole",
        str(without),
        "--format",
        "adapterhub",
        "--no-head",
    )
    assert done.returncode == 0, done
    assert sorted(path.name for path in without.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    arguments = ["tenant", "import", str(exchange_store), "joined", "--adapter", str(without)]
    done = hmi(*arguments)
    assert (done.returncode, "pass head=" in done.stderr) == (2, True)
    done = hmi(*arguments, "--head", str(RECORDED / "double_seq_bn"), "--json")
    assert len(json.loads(done.stdout)["labels"]) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "{store}", "t", "--adapter", "{store}"], "adapter_config.json"),
        (["import", "{store}", "t", "--adapter", "{recorded}/seq_bn"], "below plot_layers=2"),
        (["import", "{store}", "../t", "--adapter", "{recorded}/seq_bn_upper"], "../t"),
        (["import", "{store}", "t", "--adapter", "{recorded}/lora", "--problem-type", "x"], "problem-type"),
        (["export", "{store}", "nobody", "{store}-out"], "nobody"),
        (["export", "{store}", "nobody", "{store}-out", "--format", "zip"], "format"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(exchange_store, arguments, said):
    done = hmi("tenant", *[part.format(store=exchange_store, recorded=RECORDED) for part in arguments])
    assert done.returncode == 2, done
    assert said in done.stderr
    assert "Traceback" not in done.stderr
