"""Tenants' files read into memory: many at once, each by one read straight to where it shall be."""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.errors import HmiError, InvalidAdapterError, ReadTimeoutError, StoreCorruptError
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.tenant_file import TenantLayout, parse_layout
from hmi_engine.memory.eviction import Tickets
from hmi_engine.memory.layout_cache import LayoutCache
from hmi_engine.memory.parameter_format import ConvertedLayout, converted
from hmi_engine.memory.streams import Arrival
from hmi_kernels import FileReads

__all__ = [
    "DEFAULT_READ_TIMEOUT",
    "Digest",
    "ParameterSource",
    "TenantReader",
    "WantedParameters",
    "digest_of",
]

Digest = tuple[int, int, str]
"""Tenant id, generation and content digest: a name never identifies weights."""

DEFAULT_READ_TIMEOUT = 30.0
"""Seconds: longer than a busy disk takes, shorter than a client waits."""

_LAYOUT_BYTES = 32 << 20
_HEADER_BYTES = 16 << 10
_STAGED_BYTES = 64 << 20
"""Of float32 that are read at a time where they are converted: what that takes of host memory."""


def digest_of(info: TenantInfo) -> Digest:
    """What a tenant's weights are known by."""
    return info.id, info.generation, info.sha256


class WantedParameters(NamedTuple):
    """A tenant's parameters, and the elements [n] that shall hold them as the layout says."""

    info: TenantInfo
    layout: TenantLayout
    destination: Tensor


class ParameterSource(Protocol):
    """Where the arena's parameters come from: files, or a tier of memory before them. Not thread-safe."""

    def load(self, wanted: Sequence[WantedParameters]) -> Sequence[HmiError | Arrival | None]:
        """Fills the destinations, of distinct tenants; for each why it could not be done, or when it is.

        None where it is done when this returns.
        """

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
    """Reads layouts, which are remembered, and data sections; a :class:`ParameterSource` without memory.

    A read that does not end in time fails its tenant alone. Until it ends, the tenant is not read again, and
    where it would have been read to is not free: see :meth:`is_reading`. The same holds where an exception
    ends the wait, such as Ctrl-C's.
    """

    def __init__(
        self,
        layout: StoreLayout,
        general: GeneralInfo,
        layout_bytes: int = _LAYOUT_BYTES,
        *,
        read_timeout: float = DEFAULT_READ_TIMEOUT,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Reads nothing yet.

        Args:
            layout: the store's files.
            general: the base that tenants must fit.
            layout_bytes: budget for layouts of files that were read before.
            read_timeout: seconds after which reads that have not ended fail.
            dtype: of the arena; other than float32, parameters are converted once they are read.
        """
        self.dtype = dtype
        self._layout = layout
        self._general = general
        self._layouts = LayoutCache(layout_bytes)
        self._read_timeout = read_timeout
        self._stuck: dict[Digest, FileReads] = {}
        self.headers_read = 0
        self.files_read = 0
        self.bytes_read = 0

    def layouts(self, infos: Sequence[TenantInfo]) -> list[TenantLayout | HmiError]:
        """Where each tenant's parameters lie in the arena, its file checked, or why it cannot be served."""
        found: dict[Digest, TenantLayout | HmiError] = {}
        unknown: list[TenantInfo] = []
        for info in infos:
            layout = self._layouts.get(info.sha256)
            if self.is_reading(digest_of(info)):
                found[digest_of(info)] = self._not_ended(info)
            elif layout is None:
                unknown.append(info)
            else:
                found[digest_of(info)] = layout
        if unknown:
            found |= self._read_layouts(unknown)
        return [found[digest_of(info)] for info in infos]

    def is_reading(self, digest: Digest) -> bool:
        """Whether a read of this tenant that nobody waits for any more has not ended yet."""
        reads = self._stuck.get(digest)
        if reads is not None and reads.wait(0):
            del self._stuck[digest]
            return False
        return reads is not None

    def _read_layouts(self, infos: Sequence[TenantInfo]) -> dict[Digest, TenantLayout | HmiError]:
        """Reads the beginnings of all files at a time, for the sake of disks, and parses them."""
        starts = [torch.empty(min(info.bytes, _HEADER_BYTES), dtype=torch.uint8) for info in infos]
        problems = self._read(infos, [0] * len(infos), starts, require_finite=False)
        self.headers_read += len(infos)
        results: dict[Digest, TenantLayout | HmiError] = {}
        for info, start, problem in zip(infos, starts, problems, strict=True):
            result = problem or self._parse_layout(info, start)
            if not isinstance(result, HmiError):
                result = self._layouts.put(info.sha256, result)
            results[digest_of(info)] = result
        return results

    def _parse_layout(self, info: TenantInfo, start: Tensor) -> TenantLayout | HmiError:
        path = self._layout.resolve(info.file)
        try:
            layout = parse_layout(path, start.numpy().data, info.bytes)
            layout.check_fits(self._general, path)
        except HmiError as error:
            return error
        return layout if self.dtype is torch.float32 else converted(layout)

    def load(self, wanted: Sequence[WantedParameters]) -> list[HmiError | None]:
        """Reads files at the same time, each into its destination, which must be in host memory."""
        return [problem for part in _parts(wanted) for problem in self._load_part(part)]

    def _load_part(self, wanted: Sequence[WantedParameters]) -> list[HmiError | None]:
        data = [
            torch.empty(each.layout.file_elements)
            if isinstance(each.layout, ConvertedLayout)
            else each.destination
            for each in wanted
        ]
        starts = [each.layout.data_start for each in wanted]
        problems = self._read([each.info for each in wanted], starts, data, require_finite=True)
        for number, each in enumerate(wanted):
            if problems[number] is None:
                self.files_read += 1
                self.bytes_read += data[number].nbytes
                problems[number] = self._convert(each, data[number])
        return problems

    def _convert(self, wanted: WantedParameters, data: Tensor) -> InvalidAdapterError | None:
        layout = wanted.layout
        if not isinstance(layout, ConvertedLayout) or layout.convert(data, wanted.destination):
            return None
        return InvalidAdapterError(
            f"tenant {wanted.info.name!r} holds numbers that are too large for {self.dtype}; serve it with "
            "dtype='float32', or 'bfloat16' where it was 'float16'"
        )

    def _read(
        self,
        infos: Sequence[TenantInfo],
        offsets: Sequence[int],
        destinations: Sequence[Tensor],
        *,
        require_finite: bool,
    ) -> list[HmiError | None]:
        reads = hmi_kernels.prepare_reads(
            [self._layout.resolve(info.file) for info in infos],
            offsets,
            destinations,
            require_finite=require_finite,
        )
        # From before the start on, which an exception may end, such as Ctrl-C's: what has begun goes on.
        self._stuck |= {digest_of(info): reads for info in infos}
        has_ended = False
        try:
            reads.start()
            has_ended = reads.wait(self._read_timeout)
        finally:
            if not has_ended:
                reads.cancel()
            outcomes = reads.outcomes()
            for info, outcome in zip(infos, outcomes, strict=True):
                if not isinstance(outcome, hmi_kernels.PendingRead):
                    self._stuck.pop(digest_of(info), None)
        errors: list[HmiError | None] = []
        for info, outcome in zip(infos, outcomes, strict=True):
            is_canceled = isinstance(outcome, OSError) and outcome.errno == errno.ECANCELED
            if is_canceled or isinstance(outcome, hmi_kernels.PendingRead):
                errors.append(self._timeout(info))
            else:
                errors.append(_explain(outcome))
        return errors

    def _not_ended(self, info: TenantInfo) -> ReadTimeoutError:
        return ReadTimeoutError(
            f"{self._layout.resolve(info.file)}: an earlier read of tenant {info.name!r}, which nobody waits "
            "for any more, has not ended; other tenants are served. Ask again later, or check the disk"
        )

    def _timeout(self, info: TenantInfo) -> ReadTimeoutError:
        return ReadTimeoutError(
            f"{self._layout.resolve(info.file)}: reading tenant {info.name!r} has not ended after "
            f"{self._read_timeout:g} s; other tenants are served. Check the disk, or raise read_timeout"
        )

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


def _parts(wanted: Sequence[WantedParameters]) -> Iterator[list[WantedParameters]]:
    """As many at a time as may be staged: all where nothing is converted, and never less than one."""
    part: list[WantedParameters] = []
    num_bytes = 0
    for each in wanted:
        size = each.layout.file_elements * 4 if isinstance(each.layout, ConvertedLayout) else 0
        if part and num_bytes + size > _STAGED_BYTES:
            yield part
            part, num_bytes = [], 0
        part.append(each)
        num_bytes += size
    if part:
        yield part


def _explain(problem: OSError | EOFError | ValueError | None) -> StoreCorruptError | None:
    if problem is None:
        return None
    if isinstance(problem, OSError):
        error = StoreCorruptError(f"{problem.filename}: cannot be read: {problem.strerror}; run `hmi verify`")
    else:
        error = StoreCorruptError(f"{problem}; run `hmi verify`")
    error.__cause__ = problem
    return error
