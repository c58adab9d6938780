"""Which tenants are in memory: loaded on demand, the recent kept, none evicted while in use."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from hmi_engine.errors import HmiError, OverloadedError, StoreCorruptError
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import Head
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.tenant_file import HeadLayout, TenantLayout, read_into, read_layout
from hmi_engine.memory.arena import AdapterArena
from hmi_engine.memory.slot_tables import SlotTables

__all__ = ["AdapterResidency", "ResidencyStatistics", "ResidentTenant"]

_Digest = tuple[int, int, str]  # tenant id, generation, content digest: a name never identifies weights


@dataclass(frozen=True)
class ResidentTenant:
    """A tenant whose parameters lie in the arena.

    Attributes:
        info: the catalog's record, of exactly the generation that is loaded.
        slot: number that the grouped kernels use.
        places: (layer, site) of its blocks.
        head: the head's settings.
        parameters: float32 [n], the whole file's data: head and blocks.
        arena_offset: first element in the arena.
    """

    info: TenantInfo
    slot: int
    places: frozenset[tuple[int, str]]
    head: HeadLayout
    parameters: torch.Tensor
    arena_offset: int

    @functools.cached_property
    def output_head(self) -> Head:
        """The head, its tensors views of ``parameters``."""
        return self.head.build(self.parameters)


@dataclass
class ResidencyStatistics:
    """Counts since the engine started."""

    hits: int = 0
    loads: int = 0
    evictions: int = 0
    bytes_read: int = 0


@dataclass
class _Entry:
    tenant: ResidentTenant
    pins: int = field(default=0)


class AdapterResidency:
    """Tenants in one arena under a byte budget; the least recently used goes first."""

    def __init__(
        self, layout: StoreLayout, catalog: Catalog, general: GeneralInfo, capacity_bytes: int
    ) -> None:
        self._layout = layout
        self._catalog = catalog
        self._general = general
        self.arena = AdapterArena(capacity_bytes)
        self.slots = SlotTables()
        self.statistics = ResidencyStatistics()
        self._entries: OrderedDict[_Digest, _Entry] = OrderedDict()

    @property
    def num_resident(self) -> int:
        """Tenants in memory now."""
        return len(self._entries)

    @contextmanager
    def pinned(self, tenants: Sequence[TenantInfo]) -> Iterator[list[ResidentTenant | HmiError]]:
        """Makes tenants resident and holds them until the block ends.

        Yields, in the order of ``tenants``, the resident tenant or the error that kept it from loading
        (:class:`StoreCorruptError`; :class:`OverloadedError` if all of the arena is held by others), so that
        one damaged file fails nobody else.
        """
        held: list[_Entry] = []
        results: list[ResidentTenant | HmiError] = []
        try:
            for info in tenants:
                try:
                    entry = self._resident(info)
                except HmiError as error:
                    results.append(error)
                    continue
                entry.pins += 1
                held.append(entry)
                results.append(entry.tenant)
            yield results
        finally:
            for entry in held:
                entry.pins -= 1

    def _resident(self, info: TenantInfo) -> _Entry:
        digest = (info.id, info.generation, info.sha256)
        entry = self._entries.get(digest)
        if entry is not None:
            self._entries.move_to_end(digest)
            self.statistics.hits += 1
            return entry
        try:
            tenant = self._load(info)
        except StoreCorruptError:
            # Replaced since its record was read: the old file is gone, the new one is what to serve.
            current = self._catalog.tenants.get(info.name)
            if current is None or current.generation == info.generation:
                raise
            return self._resident(current)
        entry = self._entries[digest] = _Entry(tenant)
        return entry

    def _load(self, info: TenantInfo) -> ResidentTenant:
        path = self._layout.resolve(info.file)
        layout = read_layout(path)
        layout.check_fits(self._general, path)
        offset = self._make_room(info, layout)
        parameters = self.arena.memory[offset : offset + layout.num_elements]
        try:
            read_into(path, layout, parameters)
            if not bool(torch.isfinite(parameters).all()):
                raise StoreCorruptError(f"{path}: holds NaN or infinity; run `hmi verify`")
            slot = self.slots.assign(layout.blocks, offset)
        except BaseException:
            self.arena.release(offset, layout.num_elements)
            raise
        self.statistics.loads += 1
        self.statistics.bytes_read += layout.data_bytes
        return ResidentTenant(
            info=info,
            slot=slot,
            places=frozenset((block.layer, block.site.value) for block in layout.blocks),
            head=layout.head,
            parameters=parameters,
            arena_offset=offset,
        )

    def _make_room(self, info: TenantInfo, layout: TenantLayout) -> int:
        if self.arena.allocated_bytes(layout.num_elements) > self.arena.capacity_bytes:
            raise OverloadedError(
                f"tenant {info.name!r} needs {layout.data_bytes} bytes, more than all adapter memory, "
                f"{self.arena.capacity_bytes} bytes; give the engine more host_memory"
            )
        while (offset := self.arena.allocate(layout.num_elements)) is None:
            victim = next((digest for digest, entry in self._entries.items() if not entry.pins), None)
            if victim is None:
                raise OverloadedError(
                    f"no room for tenant {info.name!r}: this batch uses all {self.arena.capacity_bytes} "
                    "bytes of adapter memory; give the engine more host_memory or a smaller max_batch_tokens"
                )
            self._evict(victim)
        return offset

    def _evict(self, digest: _Digest) -> None:
        tenant = self._entries.pop(digest).tenant
        self.slots.clear(tenant.slot)
        self.arena.release(tenant.arena_offset, tenant.parameters.numel())
        self.statistics.evictions += 1
