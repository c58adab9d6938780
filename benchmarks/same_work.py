"""Whether systems whose times are compared do the same work: the same answers, which the adapters decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

from benchmarks.peers import Peer
from hmi_engine.errors import HmiError
from hmi_engine.knowledge.adapter_kinds.lora import LoraBlock
from hmi_engine.knowledge.adapters import Adapter
from hmi_engine.knowledge.changes import NewTenant
from hmi_engine.request import Request, Response
from hmi_engine.store import Store

__all__ = ["add_bare_twins", "check_adapters_count", "check_same_work", "copy_tenants"]

TOLERANCE = 1e-3
_LEAST_EFFECT = 2
"""Times the tolerance, for the median of the requests."""


def copy_tenants(names: Sequence[str], source: Store, target: Store) -> None:
    """The same weights in another store, whose K may be another."""
    card = {"random_weights": True}
    target.add_tenants(
        NewTenant(name, source.tenants[name].domain, *source.load_tenant(name), card) for name in names
    )


def add_bare_twins(store: Store, names: Sequence[str]) -> dict[str, str]:
    """Adds for each tenant one with its head and a LoRA that adds nothing; returns their names."""
    twins = {name: f"{name}.bare" for name in names}

    def twin(name: str) -> NewTenant:
        adapter, head = store.load_tenant(name)
        blocks = {
            place: replace(block, scale=0.0)
            for place, block in adapter.blocks.items()
            if isinstance(block, LoraBlock)
        }
        return NewTenant(
            twins[name], store.tenants[name].domain, Adapter(blocks), head, {"random_weights": True}
        )

    store.add_tenants(twin(name) for name in names)
    return twins


def check_same_work(
    ours: Peer, theirs: Peer, requests: Sequence[Request], *, tolerance: float = TOLERANCE
) -> None:
    """Makes sure that two systems give the same probabilities, so that their times compare.

    Raises:
        HmiError: they do not, within ``tolerance``; nothing should be measured then.
    """
    for request, mine, other in zip(requests, ours.run(requests), theirs.run(requests), strict=True):
        gap = _gap(mine, other)
        if gap > tolerance:
            raise HmiError(
                f"{ours.name} and {theirs.name} differ by {gap:.1e} on tenant {request.tenant}: "
                "they do not do the same work"
            )


def check_adapters_count(
    peer: Peer, requests: Sequence[Request], twins: Mapping[str, str], *, tolerance: float = TOLERANCE
) -> None:
    """Makes sure that :func:`check_same_work` would see a system that leaves adapters out or mixes them up.

    ``twins`` are the names of the tenants' twins without an adapter, see :func:`add_bare_twins`.

    Raises:
        HmiError: for half of the requests the adapter changes no probability by twice the tolerance.
    """
    bare = [replace(request, tenant=twins[request.tenant]) for request in requests]
    gaps = [_gap(*pair) for pair in zip(peer.run(requests), peer.run(bare), strict=True)]
    if median(gaps) < _LEAST_EFFECT * tolerance:
        raise HmiError(
            f"adapters change the answers by {median(gaps):.1e} only: a system without them would pass for "
            "one that does the same work"
        )


def _gap(mine: Response, other: Response) -> float:
    """The largest difference of two answers' probabilities; infinite if the labels differ."""
    for response in (mine, other):
        if response.error is not None:
            raise response.error
    if mine.scores.keys() != other.scores.keys():
        return float("inf")
    return max(abs(mine.scores[label] - other.scores[label]) for label in other.scores)
