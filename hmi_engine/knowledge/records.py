"""What the catalog knows of a domain, a tenant and a file of the general knowledge."""

from datetime import datetime, timezone
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from hmi_engine.knowledge.heads import HeadKind
from hmi_engine.knowledge.row_formats import RowFormat

__all__ = ["DomainChange", "DomainInfo", "GeneralFile", "PlotFile", "StoreFile", "TenantInfo", "TrafficInfo"]


class StoreFile(BaseModel):
    """A file of the store: path relative to its folder, size in bytes, SHA-256 in hex."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    bytes: int
    sha256: str


class PlotFile(StoreFile):
    """One generation of a domain's table, and what the catalog says of it."""

    generation: int
    rows: int
    unigrams: bool
    layer_identity: str
    corpus_tokens: int
    min_count: int
    admission_count: int
    row_format: RowFormat


class TrafficInfo(StoreFile):
    """N-grams that engines saw in a domain's traffic and that no update has taken in yet."""

    id: int
    domain_id: int
    tokens: int


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
    the weights of the domain layers: rows are looked up only among ancestors of the same identity;
    ``layers`` is their file, None where they are inherited. ``plot_bytes`` is the table's budget.
    ``previous`` is the generation before, kept so that a repair has something to fall back to.
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
    plot_bytes: int = 0
    row_format: RowFormat = "float16"
    layers: StoreFile | None = None
    previous: PlotFile | None = None

    @classmethod
    def without_table(
        cls,
        *,
        id: int,
        name: str,
        parent_id: int | None,
        parent: str | None,
        generation: int,
        layer_identity: str,
        min_count: int,
        plot_bytes: int,
        row_format: RowFormat,
    ) -> "DomainInfo":
        """Return a domain made now, with no file and no rows yet."""
        return cls(
            id=id,
            name=name,
            parent_id=parent_id,
            parent=parent,
            generation=generation,
            file=None,
            bytes=0,
            sha256="",
            rows=0,
            unigrams=False,
            layer_identity=layer_identity,
            corpus_tokens=0,
            min_count=min_count,
            admission_count=0,
            plot_bytes=plot_bytes,
            row_format=row_format,
            created=datetime.now(timezone.utc),
        )

    def plot_file(self) -> PlotFile | None:
        """Return what is known of the current table, None where there is none."""
        if self.file is None:
            return None
        fields = {name: getattr(self, name) for name in PlotFile.model_fields}
        return PlotFile.model_validate(fields)


class DomainChange(NamedTuple):
    """A domain as it was when the change was planned, None for a new one, and as it shall be."""

    before: DomainInfo | None
    after: DomainInfo


class TenantInfo(_Info):
    """A tenant: the domain it belongs to, and its file (path relative to the store, bytes, SHA-256).

    ``kind`` and ``rank`` describe the adapter, as :class:`~hmi_engine.knowledge.adapters.Adapter` does;
    ``labels`` are the head's. Engines keep ``pinned`` tenants in memory. An info may be shared by everybody
    who asks for the tenant: don't change its card.
    """

    domain_id: int
    domain: str
    kind: str
    rank: int
    file: str
    head_kind: HeadKind
    labels: tuple[str, ...]
    pinned: bool = False


class GeneralFile(NamedTuple):
    """A file of the general knowledge: path relative to ``general/``, size in bytes, SHA-256 in hex."""

    name: str
    bytes: int
    sha256: str
