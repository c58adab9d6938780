"""A store's tenants in PEFT's format, so that peers run the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hmi_engine.demo.peers.interface import ServedTenant
from hmi_engine.errors import InvalidHeadError
from hmi_engine.interop import write_peft
from hmi_engine.knowledge.heads import ClassificationHead
from hmi_engine.store import Store

__all__ = ["export_tenants"]


def export_tenants(store: Store, names: Sequence[str], directory: Path) -> list[ServedTenant]:
    """Writes LoRA tenants with classification heads below ``directory``, one PEFT folder each.

    Raises:
        InvalidAdapterError: a tenant is no LoRA.
        InvalidHeadError: a tenant's head is no classification, or reads the mean over tokens.
    """
    tenants = []
    for number, name in enumerate(names):
        adapter, head = store.load_tenant(name)
        if not isinstance(head, ClassificationHead) or head.pooling not in ("pooler", "cls"):
            raise InvalidHeadError(f"tenant {name!r}: peers serve classification of the first token only")
        folder = directory / f"{number:05d}"
        # PEFT has no word for the pooling; the peers build it into the model (ServedTenant.pooling).
        as_pooler = replace(head, pooling="pooler")
        write_peft(folder, adapter, as_pooler, store.general, base_model=store.general.source)
        tenants.append(ServedTenant(name, folder, head.labels, head.pooling))
    return tenants
