"""One case: contenders are set up, checked against what is right, then timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple

from pydantic import JsonValue
from torch import Tensor

from benchmarks.gpu.agreement import relative_error
from benchmarks.gpu.costs import Cost
from benchmarks.gpu.platform import Platform
from benchmarks.gpu.result import Family, GpuCase, GpuSystem, Speed
from benchmarks.gpu.roofline import Peak
from benchmarks.gpu.timing import DeviceTimer

__all__ = ["Bench", "Contender", "Contest", "Entry", "Planned"]


@dataclass(frozen=True)
class Entry:
    """A contender that is set up.

    ``call`` does the work once, into the same memory each time; ``result`` does it from the same start and
    gives what is compared.
    """

    call: Callable[[], object]
    result: Callable[[], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to do a case's work.

    Attributes:
        name: for tables.
        description: whose design, how set up.
        enter: sets it up; what it raises is the reason why a peer is skipped.
        backend: of our ops, while it runs; empty for the bench's own choice, ``cuda``.
        is_ours: then it must neither fail nor be wrong.
        can_be_captured: whether a CUDA graph of it is tried.
    """

    name: str
    description: str
    enter: Callable[[], Entry]
    backend: str = ""
    is_ours: bool = False
    can_be_captured: bool = True


@dataclass(frozen=True)
class Contest:
    """A case before it is run; ``expected`` is asked for only when it is."""

    family: Family
    name: str
    settings: dict[str, JsonValue]
    cost: Cost
    bound: float
    expected: Callable[[], Tensor]
    contenders: Sequence[Contender]
    is_on_roofline: bool = True


class Planned(NamedTuple):
    """A case that is made only when it is run: the inputs of all would not fit into memory."""

    name: str
    make: Callable[[], Contest]


@dataclass
class Bench:
    """What all contests share: the platform and, unless dry, timer and peak; and what of ours was wrong."""

    platform: Platform
    timer: DeviceTimer | None
    peak: Peak | None
    failures: list[str] = field(default_factory=list)

    def run(self, contest: Contest) -> GpuCase:
        """Sets up, checks and times the contenders; what is wrong is not timed."""
        expected = contest.expected()
        entries: dict[str, Entry] = {}
        systems: dict[str, GpuSystem] = {}
        for contender in contest.contenders:
            system, entry = self._set_up(contender, expected, contest)
            systems[contender.name] = system
            if entry is not None:
                entries[contender.name] = entry
        if self.timer is not None:
            contenders = {each.name: each for each in contest.contenders if each.name in entries}
            systems |= self._timed(self.timer, contest, systems, entries, contenders)
        return GpuCase(
            family=contest.family,
            name=contest.name,
            settings=contest.settings,
            least_bytes=contest.cost.bytes,
            flop=contest.cost.flop,
            systems=tuple(systems.values()),
        )

    def _set_up(
        self, contender: Contender, expected: Tensor, contest: Contest
    ) -> tuple[GpuSystem, Entry | None]:
        name, description = contender.name, contender.description
        entry, reason, error = None, "", None
        try:
            entry = contender.enter()
            with self._backend(contender):
                error = relative_error(entry.result(), expected)
        except Exception as failure:  # whatever a peer lacks here: it is said, and the others go on
            reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        if error is not None and error > contest.bound:
            reason = f"differs from the reference by {error:.2g}, more than {contest.bound:.2g}"
        if not reason:
            return GpuSystem(name=name, description=description, error=error), entry
        if contender.is_ours:
            self.failures.append(f"{contest.name}: {contender.name}: {reason}")
        return GpuSystem(name=name, description=description, skipped=reason), None

    def _timed(
        self,
        timer: DeviceTimer,
        contest: Contest,
        systems: Mapping[str, GpuSystem],
        entries: Mapping[str, Entry],
        contenders: Mapping[str, Contender],
    ) -> dict[str, GpuSystem]:
        hosts, graphs = {}, {}
        for name, entry in entries.items():
            with self._backend(contenders[name]):
                hosts[name] = timer.host(entry.call)
                if contenders[name].can_be_captured and (graph := timer.capture(entry.call)) is not None:
                    graphs[name] = graph
        eager = timer.eager({name: self._bound(entry, contenders[name]) for name, entry in entries.items()})
        replayed = timer.graphs(graphs)
        peak = self.peak if contest.is_on_roofline else None
        return {
            name: systems[name].model_copy(
                update={
                    "eager": Speed.of(eager[name], contest.cost, peak),
                    "graph": Speed.of(replayed[name], contest.cost, peak) if name in replayed else None,
                    "host_microseconds": 1e6 * hosts[name],
                }
            )
            for name in entries
        }

    def _backend(self, contender: Contender) -> AbstractContextManager[None]:
        return self.platform.backend(contender.backend)

    def _bound(self, entry: Entry, contender: Contender) -> Callable[[], object]:
        """The call with its backend chosen; choosing costs the host time, and the device none."""
        if not contender.backend:
            return entry.call

        def call() -> None:
            with self._backend(contender):
                entry.call()

        return call
