"""Benchmarks refuse to time systems that do other work, and answers in which that could not be seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from hmi_engine.demo.building import add_random_tenants
from hmi_engine.demo.peers import HmiPeer, ServedTenant
from hmi_engine.demo.tasks import Task
from hmi_engine.engine import Engine
from hmi_engine.errors import HmiError, UnknownTenantError
from hmi_engine.knowledge.examples import Example
from hmi_engine.request import Request, Response
from hmi_engine.store import Store

same_work = pytest.importorskip(
    "benchmarks.same_work", reason="the peers' package needs numba (extra: bench)"
)


class Oracle:
    """A peer that always answers the same probability."""

    description = ""

    def __init__(self, name: str, probability: float, error: HmiError | None = None) -> None:
        self.name, self._probability, self._error = name, probability, error

    def prepare(self, tenants: Sequence[ServedTenant]) -> None:
        """Needs nothing."""

    def run(self, requests: Sequence[Request]) -> list[Response]:
        if self._error is not None:
            return [Response.failed(request, self._error) for request in requests]
        scores = {"no": 1 - self._probability, "yes": self._probability}
        return [Response(request.tenant, "classification", "yes", scores) for request in requests]

    def close(self) -> None:
        """Holds nothing."""


REQUESTS = [Request("tenant", "text")]


def test_equal_systems_pass() -> None:
    same_work.check_same_work(Oracle("ours", 0.7), Oracle("theirs", 0.7004), REQUESTS)


def test_different_systems_are_refused() -> None:
    with pytest.raises(HmiError, match=r"ours and theirs differ by 1\.0e-02 on tenant tenant"):
        same_work.check_same_work(Oracle("ours", 0.71), Oracle("theirs", 0.7), REQUESTS)


def test_a_failed_request_is_not_compared() -> None:
    failing = Oracle("ours", 0, UnknownTenantError("who"))
    with pytest.raises(UnknownTenantError):
        same_work.check_same_work(failing, Oracle("theirs", 0.7), REQUESTS)


@pytest.fixture
def half(tiny_bert: Path, tmp_path: Path) -> Iterator[Store]:
    examples = tuple(Example("the cell", label) for label in ("first", "second"))
    with Store.create(tmp_path / "half", general=tiny_bert, plot_layers=2) as store:
        add_random_tenants(store, [Task("task", "general", "", examples, examples)], 4, rank=4)
        yield store


def test_copied_tenants_have_the_same_weights_whatever_is_looked_up(
    half: Store, tiny_bert: Path, tmp_path: Path
) -> None:
    with Store.create(tmp_path / "plain", general=tiny_bert, plot_layers=0) as plain:
        same_work.copy_tenants(list(half.tenants), half, plain)
        for name in half.tenants:
            (adapter, head), (copied, copied_head) = half.load_tenant(name), plain.load_tenant(name)
            assert copied.blocks.keys() == adapter.blocks.keys()
            assert torch.equal(copied_head.weight, head.weight)
            for place, block in adapter.blocks.items():
                for part, tensor in block.tensors().items():
                    assert torch.equal(copied.blocks[place].tensors()[part], tensor)


def test_a_system_that_left_adapters_out_would_be_seen(half: Store) -> None:
    names = list(half.tenants)
    twins = same_work.add_bare_twins(half, names)
    requests = [Request(name, f"the cell {number}") for number, name in enumerate(names)]
    with Engine(half) as engine:
        ours = HmiPeer(engine, name="ours", description="")
        same_work.check_adapters_count(ours, requests, twins)
        with pytest.raises(HmiError, match=r"change the answers by 0\.0e\+00 only"):
            same_work.check_adapters_count(ours, requests, dict(zip(names, names, strict=True)))
