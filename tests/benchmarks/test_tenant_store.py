"""The benchmark of many tenants: its peers keep the same tensors, its stores are sound, and it runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hmi_engine as hmi

REASON = "the benchmark's peers need the extra: bench"
tenant_store = pytest.importorskip("benchmarks.tenant_store", reason=REASON)
phases = pytest.importorskip("benchmarks.tenant_store_phases", reason=REASON)
made_up = pytest.importorskip("benchmarks.made_up_tenants", reason=REASON)
folders = pytest.importorskip("benchmarks.peers.adapter_folders", reason=REASON)
read_results = pytest.importorskip("benchmarks.result", reason=REASON).read_results


@pytest.fixture
def store(tiny_bert: Path, tmp_path: Path) -> hmi.Store:
    with hmi.Store.create(tmp_path / "store", general=tiny_bert, plot_layers=2) as created:
        yield created


@pytest.mark.parametrize("shape", ["mixed", "small"])
def test_made_up_tenants_are_distinct_the_same_again_and_fit(store: hmi.Store, shape: str) -> None:
    draw = made_up.TenantDrawer(store.general, shape)
    assert store.add_tenants(draw(range(40))) == 40
    assert store.verify() == []
    assert len({info.sha256 for info in store.tenants.values()}) == 40
    if shape == "mixed":
        kinds = {(info.kind, info.rank) for info in store.tenants.values()}
        assert len(kinds) == 8 and {kind for kind, _ in kinds} == {"lora", "bottleneck", "ia3", "bitfit"}
    (again,) = made_up.TenantDrawer(store.general, shape)(range(7, 8))
    adapter, head = store.load_tenant(again.name)
    assert torch.equal(head.weight, again.head.weight)
    for place, block in again.adapter.blocks.items():
        assert all(
            torch.equal(adapter.blocks[place].tensors()[name], tensor)
            for name, tensor in block.tensors().items()
        )


@pytest.mark.parametrize("sync", [False, True])
def test_folders_hold_the_same_tensors(
    store: hmi.Store, tmp_path: Path, sync: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    tenants = list(made_up.TenantDrawer(store.general, "mixed")(range(5)))
    assert folders.save_folders(tmp_path / "peer", iter(tenants), sync=sync) == 5
    assert len(flushed) == (20 if sync else 0)
    listed = folders.list_folders(tmp_path / "peer")
    assert sorted(listed) == sorted(tenant.name for tenant in tenants)
    for tenant in tenants:
        saved = load_file(tmp_path / "peer" / tenant.name / folders.WEIGHTS)
        assert sum(tensor.numel() for tensor in saved.values()) == tenant.adapter.num_parameters + sum(
            tensor.numel() for tensor in tenant.head.tensors().values()
        )
        assert torch.equal(saved["classifier.weight"], tenant.head.weight)
        assert listed[tenant.name]["labels"] == list(tenant.head.labels)


def test_figures_are_of_a_sound_store_that_loses_what_was_removed(store: hmi.Store, tmp_path: Path) -> None:
    store.add_tenants(made_up.TenantDrawer(store.general, "small")(range(30)))
    total = sum(info.bytes for info in store.tenants.values())
    store.close()
    figures = phases.measure_store(tmp_path / "store", 30)
    assert (figures.tenant_bytes, figures.num_collected) == (total, 3)
    assert figures.disk_bytes > total and min(vars(figures).values()) > 0
    with hmi.Store.open(tmp_path / "store") as left:
        assert len(left.tenants) == 24 and left.verify() == []
        path = left.layout.resolve(next(iter(left.tenants.values())).file)
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(hmi.HmiError, match="not sound"):
        phases._verify(tmp_path / "store")


def test_allocated_bytes_are_those_of_du(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"x" * 10_000)
    told = subprocess.run(
        ["du", "--summarize", "--block-size=1", tmp_path], capture_output=True, check=True, text=True
    )
    assert phases.allocated_bytes(tmp_path) == int(told.stdout.split()[0]) >= 10_000


def test_the_quick_benchmark_runs(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenant_store, "packaged_model", lambda: tiny_bert)
    out, work = tmp_path / "results" / "tenant_store.json", tmp_path / "work"
    work.mkdir()
    tenant_store.main(["--quick", "--out", str(out), "--folder", str(work)])
    assert list(work.iterdir()) == []
    [result] = read_results(out.parent)
    assert result.is_quick and result.name == "tenant_store"
    assert [case.name for case in result.cases] == [
        "adding 10 small tenants",
        "adding 24 mixed tenants",
        "opening and listing 24 mixed tenants",
    ]
    for case in result.cases:
        assert {ratio.faster for ratio in case.ratios} == {tenant_store.OURS}
    assert len(result.quantities) == 2 * 14
