"""How long a stage takes, learnt from what it took, and how large the next batch may be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["BatchSizer", "StageCoefficients", "StageCosts", "StageWork"]

MEMORY_OBSERVATIONS = 64.0
FIRST_BATCH_TOKENS = 512
"""Of a batch under a latency target before any stage was measured."""

_UNUSUAL = 2.0  # mean errors: an observation farther off pulls no harder than one that is so far off
_CLIPPED = 4.0  # mean errors: what one observation may count for in the mean error
_ERROR_MEMORY = 16.0  # observations; short, so that a lasting change is believed soon
_FIRST_ERROR = 0.5
_PRIOR_OBSERVATIONS = 0.1
_FITS_EACH_TIME = 16  # observations; after these a fit serves for several
_OBSERVATIONS_PER_FIT = 8
_LEAST_ERROR = 1e-3
_MIN_SECONDS = 1e-6
_UNITS = ("fixed", "tokens", "tenants", "bytes")


@dataclass(frozen=True, slots=True)
class StageWork:
    """What a batch asks of a stage."""

    tokens: float = 0
    tenants: float = 0
    num_bytes: float = 0


@dataclass(frozen=True, slots=True)
class StageCoefficients:
    """Seconds that a stage takes: fixed for each batch, and for each token, tenant and byte."""

    fixed: float
    per_token: float
    per_tenant: float
    per_byte: float

    def seconds(self, work: StageWork) -> float:
        """For ``work``."""
        amounts = (
            self.per_token * work.tokens + self.per_tenant * work.tenants + self.per_byte * work.num_bytes
        )
        return self.fixed + amounts


class StageCosts:
    """Fits ``fixed + per_token * tokens + per_tenant * tenants + per_byte * bytes`` to a stage's seconds.

    No coefficient is negative. Method: recursive least squares with exponential forgetting, errors taken in
    relation to the prediction (a stage's time varies by a share of itself), and weights after Huber ("Robust
    estimation of a location parameter", Annals of Mathematical Statistics 1964): one stall moves the fit by
    little, and if many observations lie far off, that becomes usual and the fit follows them.

    Few observations, or equal ones, leave several fits open; then a weak prior decides: all time goes with
    ``driven_by``. So the first observation already predicts, by proportion. Not thread-safe.
    """

    def __init__(self, *, driven_by: str = "tokens", memory: float = MEMORY_OBSERVATIONS) -> None:
        """Nothing was observed.

        Args:
            driven_by: ``tokens``, ``tenants`` or ``bytes``: what the time goes with until observations tell.
            memory: in so many observations the weight of one falls to 1/e.

        Raises:
            ValueError: an option is none of those above, or out of range.
        """
        if driven_by not in _UNITS[1:]:
            raise ValueError(f"driven_by is {driven_by!r}, must be one of {', '.join(_UNITS[1:])}")
        if not memory >= 1:
            raise ValueError(f"memory is {memory}, must be at least 1 observation")
        self.num_observed = 0
        self._driver = _UNITS.index(driven_by)
        self._kept = math.exp(-1 / memory)
        self._amounts = [0.0] * 4  # sums of (1, tokens, tenants, bytes), older ones less
        self._seconds = 0.0
        self._moments = [[0.0] * 4 for _ in range(4)]  # the same of their products, by weight
        self._products = [0.0] * 4  # and of their products with seconds
        self._error = _FIRST_ERROR
        self._fit: StageCoefficients | None = None

    @property
    def coefficients(self) -> StageCoefficients | None:
        """The fit; None before the first observation."""
        return self._fit

    @property
    def relative_error(self) -> float:
        """How far off predictions are of late, as a share of themselves; far outliers count little."""
        return self._error

    def observe(self, work: StageWork, seconds: float) -> None:
        """The stage took ``seconds`` for ``work``.

        Raises:
            ValueError: a number is negative or not finite.
        """
        amounts = (1.0, work.tokens, work.tenants, work.num_bytes)
        if not all(math.isfinite(number) and number >= 0 for number in (*amounts, seconds)):
            raise ValueError(f"{work} took {seconds} s: all must be finite and not negative")
        weight = self._weight(work, seconds)
        self.num_observed += 1
        self._seconds = self._kept * self._seconds + seconds
        for i, amount in enumerate(amounts):
            self._amounts[i] = self._kept * self._amounts[i] + amount
            self._products[i] = self._kept * self._products[i] + weight * amount * seconds
            for j, other in enumerate(amounts):
                self._moments[i][j] = self._kept * self._moments[i][j] + weight * amount * other
        if self.num_observed <= _FITS_EACH_TIME or self.num_observed % _OBSERVATIONS_PER_FIT == 0:
            self._fit = self._fitted()

    def seconds(self, work: StageWork) -> float | None:
        """What the stage will take for ``work``; None before the first observation."""
        return None if self._fit is None else self._fit.seconds(work)

    def typical(self, tokens: float) -> StageWork:
        """Work of so many tokens, with as many tenants and bytes to a token as batches had of late."""
        scale = tokens / self._amounts[1] if self._amounts[1] > 0 else 0.0
        return StageWork(tokens, scale * self._amounts[2], scale * self._amounts[3])

    def within(self, seconds: float, unit: str) -> float:
        """How many ``tokens``, ``tenants`` or ``bytes`` take the stage ``seconds``.

        The others go with them as they did of late. 0 if the fixed part alone takes longer; infinite if they
        cost nothing, as far as was observed.
        """
        if self._fit is None:
            return math.inf
        slope = self._slope(self._fit, unit)
        return max(0.0, seconds - self._fit.fixed) / slope if slope > 0 else math.inf

    def efficient(self, unit: str) -> float:
        """How many of ``unit`` take as long as the fixed part: fewer waste more than half of the time."""
        return 0.0 if self._fit is None else self.within(2 * self._fit.fixed, unit)

    def _slope(self, fit: StageCoefficients, unit: str) -> float:
        """Seconds for one more of ``unit``, with what goes with it."""
        amount = self._amounts[_UNITS.index(unit)]
        if amount <= 0:
            return 0.0
        _, tokens, tenants, num_bytes = self._amounts
        return (fit.per_token * tokens + fit.per_tenant * tenants + fit.per_byte * num_bytes) / amount

    def _weight(self, work: StageWork, seconds: float) -> float:
        """Of an observation; notes how far off the prediction was."""
        if self._fit is None:
            return 1.0
        mean = max(self._seconds / self._amounts[0], _MIN_SECONDS)
        predicted = self._fit.seconds(work)
        scale = max(predicted, 0.1 * mean, _MIN_SECONDS)  # or one predicted near 0 would outweigh all
        error = abs(seconds - predicted) / scale
        usual = max(self._error, _LEAST_ERROR)
        self._error += (min(error, _CLIPPED * usual) - self._error) / _ERROR_MEMORY
        # Relative to the mean, so that a stage that becomes slower is not held by the small times of before.
        return min(1.0, _UNUSUAL * usual / error if error > 0 else 1.0) * (mean / scale) ** 2

    def _fitted(self) -> StageCoefficients:
        """Minimises the weighted squares, and by a little the distance from the prior, over what is not < 0.

        All is scaled by the root of the weighted squares of each amount: one of bytes is no larger than one
        of tenants then, and the prior, which is the fit by ``driven_by`` alone, becomes the same value again.
        """
        seen = [i for i in range(4) if self._moments[i][i] > 0]
        scale = {i: math.sqrt(self._moments[i][i]) for i in seen}
        prior = _PRIOR_OBSERVATIONS / self._amounts[0]
        driver = self._driver if self._driver in seen else 0
        matrix = [
            [self._moments[i][j] / (scale[i] * scale[j]) + prior * (i == j) for j in seen] for i in seen
        ]
        vector = [self._products[i] / scale[i] * (1 + prior * (i == driver)) for i in seen]
        found = dict(zip(seen, _nonnegative_minimum(matrix, vector), strict=True))
        return StageCoefficients(*(found[i] / scale[i] if i in seen else 0.0 for i in range(4)))


class BatchSizer:
    """How many tokens the next batch may have, and how many bytes it may fetch.

    A request waits for the next batch to be formed, and then for the batches in flight, its own among them.
    Each takes as long as its slowest stage. So ``depth`` + 1 times that must be within the latency target.
    A batch is never made so small that a stage's fixed part takes more than half of its time: under load the
    queue would grow, and latency with it. Not thread-safe.
    """

    def __init__(
        self,
        stages: Mapping[str, StageCosts],
        *,
        max_batch_tokens: int,
        latency_target: float | None = None,
        compute: str = "compute",
        fetch: str = "fetch",
    ) -> None:
        """For a pipeline of ``stages``, whose costs the caller observes.

        Args:
            stages: by name.
            max_batch_tokens: most tokens of a batch.
            latency_target: seconds from a request's arrival to its response; None for no target.
            compute: the stage behind which another hides.
            fetch: the stage that hides.

        Raises:
            ValueError: an option is out of range, or names no stage.
        """
        if max_batch_tokens < 1:
            raise ValueError(f"max_batch_tokens is {max_batch_tokens}, must be at least 1")
        if latency_target is not None and not latency_target > 0:
            raise ValueError(f"latency_target is {latency_target} s, must be above 0, or None for no target")
        for name in (compute, fetch):
            if name not in stages:
                raise ValueError(f"{name!r} is no stage; there are {', '.join(sorted(stages))}")
        self.max_batch_tokens = max_batch_tokens
        self.latency_target = latency_target
        self._stages = dict(stages)
        self._compute = stages[compute]
        self._fetch = stages[fetch]

    def batch_tokens(self, depth: int) -> int:
        """Of the next batch, 1 to ``max_batch_tokens``, where ``depth`` batches are in flight with it.

        Raises:
            ValueError: ``depth`` is below 1.
        """
        if depth < 1:
            raise ValueError(f"depth is {depth}, must be at least 1: the batch itself is in flight")
        if self.latency_target is None:
            return self.max_batch_tokens
        measured = [costs for costs in self._stages.values() if costs.num_observed]
        if not measured:
            return min(FIRST_BATCH_TOKENS, self.max_batch_tokens)
        seconds = self.latency_target / (depth + 1)
        tokens = min(max(costs.within(seconds, "tokens"), costs.efficient("tokens")) for costs in measured)
        return max(1, math.floor(min(tokens, self.max_batch_tokens)))

    def cold_bytes(self, in_flight: Iterable[StageWork], *, batch_tokens: int) -> int | None:
        """How many bytes the next batch may fetch: what arrives while those in flight are computed.

        At least what arrives while a batch of ``batch_tokens`` is computed, so that batches do not shrink
        together where fetching is slower than computing.

        Args:
            in_flight: the work of the batches that are formed and not computed.
            batch_tokens: of the next batch, as :meth:`batch_tokens` tells.

        Returns:
            None if nothing is known yet, or bytes cost nothing as far as was observed: no limit.
        """
        own = self._compute.seconds(self._compute.typical(batch_tokens))
        if own is None:
            return None
        ahead = sum(self._compute.seconds(work) or 0.0 for work in in_flight)
        num_bytes = self._fetch.within(max(own, ahead), "bytes")
        return math.floor(num_bytes) if math.isfinite(num_bytes) else None


def _nonnegative_minimum(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    """Finds z >= 0 where z'Mz - 2 v'z is least; M is symmetric and positive definite, of a few rows.

    Where z is not 0 it is the unconstrained minimum over these places alone, so all sets of places are tried.
    """
    size = len(vector)
    best, least = [0.0] * size, 0.0
    for count in range(size, 0, -1):
        for places in itertools.combinations(range(size), count):
            part = _solved([[matrix[i][j] for j in places] for i in places], [vector[i] for i in places])
            if min(part) < 0:
                continue
            found = dict(zip(places, part, strict=True))
            value = -sum(vector[i] * z for i, z in found.items())  # z'Mz = v'z there
            if value < least:
                best, least = [found.get(i, 0.0) for i in range(size)], value
            if count == size:
                return best  # no set of places can do better than all of them
    return best


def _solved(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    """Gaussian elimination; a positive definite matrix needs no pivoting."""
    size = len(vector)
    rows = [[*row, value] for row, value in zip(matrix, vector, strict=True)]
    for i in range(size):
        for k in range(i + 1, size):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i], strict=True)]
    solution = [0.0] * size
    for i in reversed(range(size)):
        known = sum(rows[i][j] * solution[j] for j in range(i + 1, size))
        solution[i] = (rows[i][size] - known) / rows[i][i]
    return solution
