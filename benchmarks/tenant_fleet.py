"""Thousands of distinct tenants of mixed kinds and ranks, and the requests that ask for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.residency_traces import zipf_ranks
from hmi_engine.knowledge.adapters import random_adapter
from hmi_engine.knowledge.changes import NewTenant
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import ClassificationHead

__all__ = ["FLEET", "Traffic", "draw_requests", "fleet_tenants", "tenant_name"]

FLEET: tuple[tuple[str, int], ...] = (
    ("lora", 4),
    ("lora", 8),
    ("lora", 16),
    ("bottleneck", 8),
    ("bottleneck", 16),
    ("bottleneck", 32),
    ("ia3", 0),
    ("bitfit", 0),
)
"""Kind and rank of the tenants in turn; LoRA on query and value, bottlenecks in Pfeiffer's place."""

_LABELS = ("first", "second", "third", "fourth")


def tenant_name(number: int) -> str:
    """Name of a tenant of the fleet."""
    return f"fleet/{number:06d}"


def fleet_tenants(general: GeneralInfo, domain: str, numbers: range) -> Iterator[NewTenant]:
    """Tenants with random weights of their own: same number, same weights."""
    for number in numbers:
        kind, rank = FLEET[number % len(FLEET)]
        yield NewTenant(
            tenant_name(number),
            domain,
            random_adapter(general, kind, rank, number),
            _head(general.hidden_size, number),
            {"random_weights": True},
        )


def _head(hidden_size: int, seed: int) -> ClassificationHead:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(_LABELS), hidden_size, generator=generator) * 0.05
    return ClassificationHead(_LABELS, weight, torch.zeros(len(_LABELS)), "cls")


@dataclass(frozen=True)
class Traffic:
    """Whom requests ask for: of ``num_tenants``, the r-th popular in proportion to ``1 / r ** exponent``.

    ``exponent`` 0 is uniform. Popularity has nothing to do with kind, rank or age.
    """

    num_tenants: int
    exponent: float


def draw_requests(
    traffic: Traffic, texts: Sequence[str], count: int, seed: int, *, popularity_seed: int = 0
) -> list[tuple[str, str]]:
    """Pairs of tenant name and text; the texts follow each other, so that none comes twice in a row."""
    order = np.random.default_rng(popularity_seed).permutation(traffic.num_tenants)
    generator = np.random.default_rng(seed)
    numbers = order[zipf_ranks(traffic.num_tenants, traffic.exponent, count, generator)]
    names = [tenant_name(int(number)) for number in numbers]
    return [(name, texts[(seed * count + place) % len(texts)]) for place, name in enumerate(names)]
