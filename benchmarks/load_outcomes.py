"""What became of requests that were sent at given times: latencies, goodput, refusals."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Fate", "Outcomes", "Sample", "Summary", "summarise"]

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

    ``due`` and ``finished`` are float64 [n], ``fates`` int8 [n]; what has not ended has finished at NaN.
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
class Sample:
    """The requests that were due in some span of time.

    Attributes:
        seconds: the span.
        latencies: seconds from when a request was due to its answer, of those answered without error.
        refused: how many.
        expired: how many.
        failed: how many.
    """

    seconds: float
    latencies: list[float]
    refused: int
    expired: int
    failed: int

    @classmethod
    def of(cls, outcomes: Outcomes, since: float, until: float) -> Sample:
        """Of the requests due from ``since`` to ``until``; raises ValueError if one has no end yet."""
        chosen = outcomes.between(since, until)
        counts = np.bincount(chosen.fates, minlength=len(Fate)).tolist()
        if counts[Fate.OPEN]:
            raise ValueError(f"{counts[Fate.OPEN]} of {len(chosen)} requests have not ended")
        latencies = (chosen.finished - chosen.due)[chosen.fates == Fate.ANSWERED]
        return cls(
            until - since, latencies.tolist(), counts[Fate.REFUSED], counts[Fate.EXPIRED], counts[Fate.FAILED]
        )


@dataclass(frozen=True)
class Summary:
    """What samples say together.

    Attributes:
        offered: requests per second.
        answered: per second, without error.
        goodput: per second, of those answered within the deadline.
        p50: median latency of those answered, in seconds; NaN if there are none.
        p95: the same, 95th percentile.
        p99: the same, 99th percentile.
        refused_share: of all.
        expired_share: of all.
        failed: how many.
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


def summarise(samples: Sequence[Sample], deadline: float) -> Summary:
    """All requests of at least one sample together."""
    latencies = np.concatenate([sample.latencies for sample in samples])
    refused, expired = (sum(vars(sample)[name] for sample in samples) for name in ("refused", "expired"))
    failed = sum(sample.failed for sample in samples)
    count = len(latencies) + refused + expired + failed
    seconds = sum(sample.seconds for sample in samples)
    quantiles = np.quantile(latencies, [0.5, 0.95, 0.99]) if len(latencies) else np.full(3, np.nan)
    return Summary(
        offered=count / seconds,
        answered=len(latencies) / seconds,
        goodput=float((latencies <= deadline).sum()) / seconds,
        p50=float(quantiles[0]),
        p95=float(quantiles[1]),
        p99=float(quantiles[2]),
        refused_share=refused / max(1, count),
        expired_share=expired / max(1, count),
        failed=failed,
    )
