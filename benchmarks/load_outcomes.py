"""What became of requests that were sent at given times: latencies, goodput, refusals."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Fate", "Outcomes", "Summary", "summarise"]

_Floats = npt.NDArray[np.float64]


class Fate(enum.IntEnum):
    """What became of a request."""

    OPEN = 0
    """Nothing yet."""
    ANSWERED = 1
    """Answered without error, in time or not."""
    REFUSED = 2
    """Not let into the queue."""
    EXPIRED = 3
    """Let in, but its timeout passed before it was begun."""
    FAILED = 4
    """Any other error."""


class Outcomes:
    """Requests by number: when they were due, what became of them and when, in seconds of one clock.

    ``due`` and ``finished`` are float64 [n], ``fates`` int8 [n]; a request without an end has finished at NaN.
    """

    def __init__(self, due: _Floats) -> None:
        """Nothing has become of any."""
        self.due = np.asarray(due, dtype=np.float64)
        self.finished = np.full(len(self.due), np.nan)
        self.fates = np.zeros(len(self.due), dtype=np.int8)

    def __len__(self) -> int:
        """How many requests."""
        return len(self.due)

    def end(self, number: int, fate: Fate, now: float) -> None:
        """Request ``number`` met its fate; raises ValueError if it had one already."""
        if self.fates[number] != Fate.OPEN:
            raise ValueError(f"request {number} ended as {Fate(int(self.fates[number])).name} already")
        self.fates[number] = fate
        self.finished[number] = now

    def select(self, chosen: npt.NDArray[np.bool_]) -> Outcomes:
        """Those that ``chosen``, bool [n], names."""
        selected = Outcomes(self.due[chosen])
        selected.finished, selected.fates = self.finished[chosen], self.fates[chosen]
        return selected

    def between(self, since: float, until: float) -> Outcomes:
        """Those that were due then."""
        return self.select((self.due >= since) & (self.due < until))

    def finish_rate(self, since: float, until: float) -> float:
        """Requests answered per second of that time, whenever they were due."""
        is_inside = (self.finished >= since) & (self.finished < until)
        return float((is_inside & (self.fates == Fate.ANSWERED)).sum() / (until - since))


@dataclass(frozen=True)
class Summary:
    """Requests that were due in some span of time.

    Attributes:
        offered: per second.
        answered: per second, without error.
        goodput: per second, of those answered within the deadline.
        p50: median latency of the answered ones, in seconds from when they were due; NaN if there are none.
        p95: the same, 95th percentile.
        p99: the same, 99th percentile.
        refused_share: of all.
        expired_share: of all.
        failed: how many.
        count: of all.
    """

    offered: float
    answered: float
    goodput: float
    p50: float
    p95: float
    p99: float
    refused_share: float
    expired_share: float
    failed: int
    count: int


def summarise(parts: Sequence[Outcomes], seconds: float, deadline: float) -> Summary:
    """All requests of ``parts`` together, which were due in ``seconds`` altogether.

    Raises:
        ValueError: a request has no end yet.
    """
    fates = np.concatenate([part.fates for part in parts])
    if open_ones := int((fates == Fate.OPEN).sum()):
        raise ValueError(f"{open_ones} of {len(fates)} requests have not ended")
    latencies = np.concatenate([part.finished - part.due for part in parts])[fates == Fate.ANSWERED]
    quantiles = np.quantile(latencies, [0.5, 0.95, 0.99]) if len(latencies) else [np.nan] * 3
    return Summary(
        offered=len(fates) / seconds,
        answered=len(latencies) / seconds,
        goodput=float((latencies <= deadline).sum()) / seconds,
        p50=float(quantiles[0]),
        p95=float(quantiles[1]),
        p99=float(quantiles[2]),
        refused_share=float((fates == Fate.REFUSED).mean()) if len(fates) else 0.0,
        expired_share=float((fates == Fate.EXPIRED).mean()) if len(fates) else 0.0,
        failed=int((fates == Fate.FAILED).sum()),
        count=len(fates),
    )
