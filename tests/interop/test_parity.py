"""The engine's answers against PEFT's, and against those recorded of the `adapters` library."""

import subprocess
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import hmi_engine as hmi
from benchmarks.parity_cases import (
    PEFT_CASES,
    RECORDED,
    largest_errors,
    peft_references,
    recorded_references,
)

from .adapterhub_reference.make import HERE, make_environment, record
from .conftest import BERT_CLASSES

BAR = 1e-4
MATTERS = 1e-3
"""An adapter that changes answers by less than that would prove nothing."""

INPUTS = [[2, 7, 3], [2, 9, 10, 11, 12, 3], [2, *range(5, 25), 3]]
RECORDED_CASES = sorted(path.parent.name for path in RECORDED.glob("*/adapter_config.json"))


@pytest.fixture(scope="module")
def peft_errors(tmp_path_factory):
    """Errors of every PEFT case for K = 0 and K = 2, on the recorded base model."""
    folder = tmp_path_factory.mktemp("peft")
    references = dict(peft_references(RECORDED / "base", folder, INPUTS, 2))
    return {
        depth: largest_errors(RECORDED / "base", folder / f"k{depth}", references, depth) for depth in (0, 2)
    }


@pytest.fixture(scope="module")
def recorded_errors(tmp_path_factory):
    """Errors of every recorded case for K = 0 and K = 2."""
    folder = tmp_path_factory.mktemp("recorded")
    references = dict(recorded_references())
    return {
        depth: largest_errors(RECORDED / "base", folder / f"k{depth}", references, depth) for depth in (0, 2)
    }


@pytest.mark.parametrize("plot_layers", [0, 2])
@pytest.mark.parametrize("name", PEFT_CASES)
def test_answers_equal_those_of_peft(peft_errors, name, plot_layers):
    found = peft_errors[plot_layers][name]
    assert found.error < BAR
    assert found.without_adapter > MATTERS


@pytest.mark.parametrize("plot_layers", [0, 2])
@pytest.mark.parametrize("name", RECORDED_CASES)
def test_answers_equal_those_of_adapterhub(recorded_errors, name, plot_layers):
    found = recorded_errors[plot_layers][name]
    assert found.error < BAR
    assert found.without_adapter > MATTERS


@torch.no_grad()
def test_peft_loads_what_hmi_exports(tmp_path):
    references = dict(peft_references(RECORDED / "base", tmp_path / "folders", INPUTS, 2))
    with hmi.Store.create(tmp_path / "store", general=RECORDED / "base", plot_layers=0) as store:
        for number, (name, reference) in enumerate(references.items()):
            case = PEFT_CASES[name]
            store.import_peft(reference.folder, tenant=f"t{number}", problem_type=reference.problem_type)
            store.export_peft(f"t{number}", tmp_path / "exported" / str(number))
            base = BERT_CLASSES[case.task_type].from_pretrained(RECORDED / "base", num_labels=case.num_labels)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model = PeftModel.from_pretrained(base, str(tmp_path / "exported" / str(number))).eval()
            assert not [w for w in caught if "missing" in str(w.message).lower()]
            for ids, expected in zip(INPUTS, reference.logits[0], strict=True):
                logits = model(input_ids=torch.tensor([ids])).logits[0]
                torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
            store.import_peft(tmp_path / "exported" / str(number), tenant=f"t{number}", replace=True)
            head = store.load_tenant(f"t{number}")[1]
            assert getattr(head, "multi_label", False) == (case.problem_type == "multi_label_classification")


def test_an_adapter_on_upper_layers_needs_nothing_dropped(tmp_path):
    """``seq_bn_upper`` has no block below layer 2, so that a store with K = 2 takes it as it is."""
    with hmi.Store.create(tmp_path / "store", general=RECORDED / "base", plot_layers=2) as store:
        imported = store.import_adapter(RECORDED / "seq_bn_upper", tenant="t")
        assert imported.dropped == ()
        assert imported.adapter.layers == (2, 3)
        assert imported.head.labels == ("no", "yes", "maybe")
        with pytest.raises(hmi.errors.InvalidAdapterError, match=r"layer 0.*lower_layers='drop'"):
            store.import_adapter(RECORDED / "seq_bn", tenant="u")


def test_the_record_is_small():
    assert sum(path.stat().st_size for path in RECORDED.rglob("*") if path.is_file()) < 1_000_000


@pytest.mark.slow
def test_a_new_environment_records_the_same_and_loads_what_hmi_exports(tmp_path):
    """Installs the library anew: minutes, and the package index."""
    python = make_environment(tmp_path / "environment")
    record(python, tmp_path / "again")
    expected, found = (load_file(f / "expected.safetensors") for f in (RECORDED, tmp_path / "again"))
    assert found.keys() == expected.keys()
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, atol=1e-5, rtol=1e-5)

    folders = []
    with hmi.Store.create(tmp_path / "store", general=RECORDED / "base", plot_layers=0) as store:
        for name in RECORDED_CASES:
            store.import_adapter(RECORDED / name, tenant=name)
            folders.append(tmp_path / "exported" / name)
            store.export_adapterhub(name, folders[-1])
    subprocess.run(
        [python, HERE / "load.py", tmp_path / "loaded.safetensors", RECORDED, *folders], check=True
    )
    loaded = load_file(tmp_path / "loaded.safetensors")
    assert {key.partition(".")[0] for key in loaded} == set(RECORDED_CASES)
    for name, logits in loaded.items():
        torch.testing.assert_close(logits, expected[name], atol=1e-4, rtol=1e-4)
