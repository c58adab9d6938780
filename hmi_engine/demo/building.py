"""Builds the demo's store: base model, domain tree, trained tenants, and many more of the same shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from hmi_engine.construct.training import TrainingSettings
from hmi_engine.demo.progress import DemoProgress
from hmi_engine.demo.settings import DemoSettings
from hmi_engine.demo.tasks import DemoData, DomainCorpus, Task
from hmi_engine.knowledge.adapter_kinds.lora import LoraBlock
from hmi_engine.knowledge.adapter_kinds.sites import Site
from hmi_engine.knowledge.adapters import Adapter, random_adapter
from hmi_engine.knowledge.changes import NewTenant
from hmi_engine.knowledge.heads import ClassificationHead, Pooling
from hmi_engine.store import Store

__all__ = ["add_random_tenants", "build_domains", "create_store", "train_tenants"]

LEARNING_RATE = 3e-3
"""Higher than the default of long trainings: a tenant of the demo learns from few steps."""

BATCH_SIZE = 32
_RANDOM_CHANGE, _RANDOM_LOGITS = 4000.0, 2.0
"""Of random tenants: LoRA changes queries and values by about as much as they are; logits are about 1."""


def create_store(directory: Path, model: str | Path, distilled: Path | None, progress: DemoProgress) -> Store:
    """A store with half of the layers looked up, over bigram windows.

    ``distilled`` is what a distillation changed of the model, if there was one.

    Raises:
        StoreExistsError: the folder exists.
        UnsupportedModelError: the model cannot be served.
    """

    def report(step: str, done: int, total: int | None) -> None:
        progress(f"base model: {step}", done, total)

    return Store.create(directory, general=model, distilled=distilled, window=2, progress=report)


def build_domains(store: Store, data: DemoData, settings: DemoSettings, progress: DemoProgress) -> None:
    """Adds the domains, parents first, each with the table of its corpus."""
    parents = {domain.parent for domain in data.domains}
    for domain in data.domains:
        is_parent = domain.name in parents
        budget = settings.parent_plot_bytes if is_parent else settings.domain_plot_bytes

        def report(step: str, done: int, total: int | None, domain: DomainCorpus = domain) -> None:
            progress(f"domain {domain.name}: {step}", done, len(domain.texts) if total is None else total)

        store.add_domain(
            domain.name, iter(domain.texts), parent=domain.parent, plot_bytes=budget, progress=report
        )


def train_tenants(
    store: Store, tasks: Sequence[Task], settings: DemoSettings, progress: DemoProgress
) -> dict[str, float]:
    """Trains a LoRA tenant for each task; returns the seconds that each took."""
    training = TrainingSettings(
        kind="lora",
        rank=settings.rank,
        learning_rate=LEARNING_RATE,
        batch_size=BATCH_SIZE,
        max_epochs=settings.max_epochs,
        max_tokens=settings.max_tokens,
    )
    seconds = {}
    for task in tasks:

        def report(
            stage: str, done: int, total: int, metrics: dict[str, float], name: str = task.name
        ) -> None:
            progress(f"tenant {name}: {stage}", done, total)

        trained = store.train_tenant(
            task.name, task.train, domain=task.domain, settings=training, progress=report
        )
        seconds[task.name] = trained.report.seconds
    return seconds


def add_random_tenants(
    store: Store,
    tasks: Sequence[Task],
    count: int,
    *,
    rank: int,
    sites: Sequence[Site] | None = None,
    pooling: Pooling = "cls",
    prefix: str = "random",
    seed: int = 0,
) -> list[str]:
    """Adds tenants with weights of their own, drawn at random, in the shapes of the tasks' tenants.

    They stand for other customers' models in measurements of size and speed; their answers mean nothing, and
    their cards say so. Adapters and heads are strong enough that a system which left an adapter out would be
    seen by its answers. LoRA is at ``sites``, by default at query and value. Tenant i is named ``prefix/i``
    and has the domain and labels of task i modulo the number of tasks.
    """

    def tenant(number: int) -> NewTenant:
        task = tasks[number % len(tasks)]
        adapter = random_adapter(store.general, "lora", rank, seed + number, sites=sites)
        adapter = _scaled(adapter, _RANDOM_CHANGE / math.sqrt(store.general.hidden_size * rank))
        head = _random_head(task.labels, store.general.hidden_size, pooling, seed + number)
        return NewTenant(_random_name(prefix, number), task.domain, adapter, head, {"random_weights": True})

    store.add_tenants(tenant(number) for number in range(count))
    return [_random_name(prefix, number) for number in range(count)]


def _scaled(adapter: Adapter, scale: float) -> Adapter:
    return Adapter(
        {
            place: replace(block, scale=scale)
            for place, block in adapter.blocks.items()
            if isinstance(block, LoraBlock)
        }
    )


def _random_name(prefix: str, number: int) -> str:
    return f"{prefix}/{number:05d}"


def _random_head(labels: Sequence[str], hidden_size: int, pooling: Pooling, seed: int) -> ClassificationHead:
    generator = torch.Generator().manual_seed(seed)
    weight = (
        torch.randn(len(labels), hidden_size, generator=generator) * _RANDOM_LOGITS / math.sqrt(hidden_size)
    )
    return ClassificationHead(tuple(labels), weight, torch.zeros(len(labels)), pooling)
