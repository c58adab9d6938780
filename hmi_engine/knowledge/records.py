"""What the catalog knows of a domain, a tenant and a file of the general knowledge."""

from datetime import datetime
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from hmi_engine.knowledge.adapters import AdapterKind
from hmi_engine.knowledge.heads import HeadKind

__all__ = ["DomainInfo", "GeneralFile", "TenantInfo"]


class _Info(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    id: int
    name: str
    generation: int
    bytes: int
    sha256: str
    card: dict[str, Any] = {}
    created: datetime


class DomainInfo(_Info):
    """A node of the domain knowledge tree.

    ``file`` is the PLOT's path relative to the store, None where the node has no table; ``bytes`` and
    ``sha256`` are that file's. ``rows`` n-grams are materialised, none rarer than ``admission_count``;
    ``unigrams`` says whether the table has a row for every token of the vocabulary. ``layer_identity`` names
    the weights of the domain layers: rows are looked up only among ancestors of the same identity.
    """

    parent_id: int | None
    parent: str | None
    file: str | None
    rows: int
    unigrams: bool
    layer_identity: str
    corpus_tokens: int
    min_count: int
    admission_count: int


class TenantInfo(_Info):
    """A tenant: the domain it belongs to, and its file (path relative to the store, bytes, SHA-256).

    ``kind`` and ``rank`` describe the adapter; ``labels`` are the head's.
    """

    domain_id: int
    domain: str
    kind: AdapterKind
    rank: int
    file: str
    head_kind: HeadKind
    labels: tuple[str, ...]


class GeneralFile(NamedTuple):
    """A file of the general knowledge: path relative to ``general/``, size in bytes, SHA-256 in hex."""

    name: str
    bytes: int
    sha256: str
