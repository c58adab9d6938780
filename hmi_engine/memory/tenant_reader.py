"""Tenants' files read into memory: many at once, each by one read straight to where it shall be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

import hmi_kernels
from hmi_engine.errors import HmiError, StoreCorruptError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.parallel import map_in_threads
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.tenant_file import TenantLayout, read_layout
from hmi_engine.memory.eviction import Tickets
from hmi_engine.memory.layout_cache import LayoutCache

__all__ = ["Digest", "ParameterSource", "TenantReader", "WantedParameters", "digest_of"]

Digest = tuple[int, int, str]
"""Tenant id, generation and content digest: a name never identifies weights."""

_LAYOUT_BYTES = 32 << 20


def digest_of(info: TenantInfo) -> Digest:
    """What a tenant's weights are known by."""
    return info.id, info.generation, info.sha256


class WantedParameters(NamedTuple):
    """A tenant's data section, and the float32 [n] that shall hold it."""

    info: TenantInfo
    layout: TenantLayout
    destination: Tensor


class ParameterSource(Protocol):
    """Where the arena's parameters come from: files, or a tier of memory before them. Not thread-safe."""

    def load(self, wanted: Sequence[WantedParameters]) -> list[HmiError | None]:
        """Fills the destinations, of distinct tenants; for each None or why it could not be done."""

    def expect(self, digests: Sequence[Digest]) -> Tickets[Digest]:
        """Notes what queued requests will need, in this order; see ``DemandQueue.expect``."""

    def release(self, tickets: Tickets[Digest]) -> None:
        """Forgets requests that have run or will not."""

    def digests(self) -> list[Digest]:
        """Whose parameters are kept here."""

    def forget(self, digest: Digest) -> None:
        """Nobody will ask for these weights again."""

    def close(self) -> None:
        """Gives memory back."""


class TenantReader:
    """Reads layouts, which are remembered, and data sections; a :class:`ParameterSource` without memory."""

    def __init__(self, layout: StoreLayout, general: GeneralInfo, layout_bytes: int = _LAYOUT_BYTES) -> None:
        """``layout_bytes``: budget for layouts of files that were read before."""
        self._layout = layout
        self._general = general
        self._layouts = LayoutCache(layout_bytes)
        self.headers_read = 0
        self.files_read = 0
        self.bytes_read = 0

    def layouts(self, infos: Sequence[TenantInfo]) -> list[TenantLayout | HmiError]:
        """The checked layout of each tenant's file, or why it cannot be served."""
        found = [self._layouts.get(info.sha256) for info in infos]
        unknown = [info for info, layout in zip(infos, found, strict=True) if layout is None]
        read = map_in_threads(self._read_layout, unknown)  # for the sake of disks, which are waited for
        results: list[TenantLayout | HmiError] = []
        for info, layout in zip(infos, found, strict=True):
            result = next(read) if layout is None else layout
            if layout is None and isinstance(result, TenantLayout):
                result = self._layouts.put(info.sha256, result)
            results.append(result)
        self.headers_read += len(unknown)
        return results

    def _read_layout(self, info: TenantInfo) -> TenantLayout | HmiError:
        path = self._layout.resolve(info.file)
        try:
            layout = read_layout(path)
            layout.check_fits(self._general, path)
        except HmiError as error:
            return error
        return layout

    def load(self, wanted: Sequence[WantedParameters]) -> list[HmiError | None]:
        """Reads files at the same time, each into its destination, which must be in host memory."""
        if not wanted:
            return []
        paths = [self._layout.resolve(each.info.file) for each in wanted]
        problems = hmi_kernels.read_files(
            paths,
            [each.layout.data_start for each in wanted],
            [each.destination for each in wanted],
            require_finite=True,
        )
        errors: list[HmiError | None] = []
        for each, problem in zip(wanted, problems, strict=True):
            if problem is None:
                self.files_read += 1
                self.bytes_read += each.layout.data_bytes
            errors.append(_explain(problem))
        return errors

    def expect(self, digests: Iterable[Digest]) -> Tickets[Digest]:
        """Keeps nothing in memory."""
        return []

    def release(self, tickets: Tickets[Digest]) -> None:
        """Does nothing."""

    def digests(self) -> list[Digest]:
        """Nobody's."""
        return []

    def forget(self, digest: Digest) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _explain(problem: OSError | EOFError | ValueError | None) -> StoreCorruptError | None:
    if problem is None:
        return None
    if isinstance(problem, OSError):
        error = StoreCorruptError(f"{problem.filename}: cannot be read: {problem.strerror}; run `hmi verify`")
    else:
        error = StoreCorruptError(f"{problem}; run `hmi verify`")
    error.__cause__ = problem
    return error
