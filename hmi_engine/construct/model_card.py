"""The card of a trained tenant: what it is, what it was made from, and how well it does.

A card lies in the tenant's entry of the catalog. So it is committed in the transaction that adds the tenant,
replaced and removed with it, and read without a file of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import datetime, timezone

from pydantic import BaseModel, ConfigDict, ValidationError

from hmi_engine.construct.training_settings import TrainingReport
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.records import GeneralFile, TenantInfo
from hmi_engine.versions import Versions, installed_versions

__all__ = ["ModelCard", "base_digest", "make_card", "read_card"]


class ModelCard(BaseModel):
    """What a trained tenant's card says.

    Attributes:
        tenant: its name when it was trained.
        domain: the domain that it was trained for.
        base: the base model, as the store was told.
        base_sha256: digest of the base model's files, in hex.
        plot_layers: how many layers were looked up.
        window: width of the n-gram windows.
        training: data, settings, figures with intervals.
        versions: of Python and the packages that took part.
        created: when the training ended.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tenant: str
    domain: str
    base: str
    base_sha256: str
    plot_layers: int
    window: int
    training: TrainingReport
    versions: Versions
    created: datetime


def make_card(
    tenant: str, domain: str, general: GeneralInfo, base_sha256: str, report: TrainingReport
) -> ModelCard:
    """The card of a training that has just ended."""
    return ModelCard(
        tenant=tenant,
        domain=domain,
        base=general.source,
        base_sha256=base_sha256,
        plot_layers=general.plot_layers,
        window=general.window,
        training=report,
        versions=installed_versions(),
        created=datetime.now(timezone.utc),
    )


def read_card(info: TenantInfo) -> ModelCard | None:
    """The card of a tenant that was trained here; None of others, and of those whose cards are older."""
    try:
        return ModelCard.model_validate(info.card)
    except ValidationError:
        return None


def base_digest(files: Iterable[GeneralFile]) -> str:
    """SHA-256 in hex of the names and checksums of the base model's files."""
    lines = sorted(f"{file.name} {file.sha256}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
