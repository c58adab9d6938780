"""Which n-grams the traffic of each domain asks for, counted in bounded memory and time."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hmi_engine.knowledge.sizes import parse_bytes
from hmi_engine.knowledge.traffic_file import TrafficCounts
from hmi_engine.models.packing import PackedSequences
from hmi_kernels import FrequencySketch

__all__ = ["DEFAULT_TRAFFIC_BYTES", "Spill", "TrafficRecorder"]

DEFAULT_TRAFFIC_BYTES = 64 << 20

Spill = Callable[[str, TrafficCounts], None]
"""Called with a domain and its counts when their memory is needed for another domain's."""

_SMALLEST_BYTES = 64 << 10
_GROWTH = 4
_LARGEST_SHARE = 4  # no domain gets more than one part in so many of the memory
_INTERVAL_SECONDS = 0.1
_MOST_HALVINGS = 10
_LIST_AGAIN = 9 / 8  # to list a sketch is to sort it: done when so many times the tokens have come


@dataclass
class _DomainTraffic:
    """One domain since its last drain; ``sketch`` counts its n-grams and may take ``sketch_bytes``.

    ``inherited_error`` is the error of the smaller sketch that it began with.
    """

    sketch: FrequencySketch | None = None
    sketch_bytes: int = 0
    inherited_error: float = 0.0
    tokens: int = 0
    windows: int = 0
    hits: int = 0
    listed: tuple[torch.Tensor, torch.Tensor] | None = None
    listed_tokens: int = 0

    def weights_of(self, keys: torch.Tensor) -> torch.Tensor:
        """float64 [M]: the weights of ``keys`` int64 [M] in the sketch as it was listed last."""
        sketch, listed = self.sketch, self.listed
        if sketch is not None and (listed is None or self.tokens >= _LIST_AGAIN * self.listed_tokens):
            self.listed_tokens = self.tokens
            self.listed = listed = sketch.items()
        if listed is None or not len(listed[0]):
            return torch.zeros(len(keys), dtype=torch.float64)
        places = torch.searchsorted(listed[0], keys).clamp_(max=len(listed[0]) - 1)
        return torch.where(listed[0][places] == keys, listed[1][places], 0.0)

    def counts(self) -> TrafficCounts:
        if self.sketch is None:
            empty = torch.empty(0, dtype=torch.int64)
            return TrafficCounts(empty, empty.double(), 0.0, 0.0, self.tokens, self.windows, self.hits)
        keys, weights = self.sketch.items()
        occurrences, max_error = self.sketch.total, self.sketch.max_error
        return TrafficCounts(keys, weights, occurrences, max_error, self.tokens, self.windows, self.hits)


class _Throttle:
    """How much of the traffic to count so that counting stays within its share of time.

    The share is halved as often as is needed, so that weights are whole numbers and their sums exact.
    """

    def __init__(self, max_share: float, now: float) -> None:
        self._max_share = max_share
        self._halvings = 0
        self._since = self._created = now
        self._spent = self._spent_before = 0.0

    @property
    def probability(self) -> float:
        return math.ldexp(1.0, -self._halvings)

    def share(self, now: float) -> float:
        """Seconds spent per second since the start."""
        return (self._spent_before + self._spent) / max(now - self._created, 1e-9)

    def spend(self, started: float, ended: float) -> None:
        self._spent += ended - started
        elapsed = ended - self._since
        if elapsed < _INTERVAL_SECONDS:
            return
        excess = self._spent / elapsed / self._max_share
        if excess > 1:
            self._halvings = min(_MOST_HALVINGS, self._halvings + math.ceil(math.log2(excess)))
        elif excess < 1 / 3:  # well below one half, or the next interval would take it back
            self._halvings = max(0, self._halvings - 1)
        self._since = ended
        self._spent_before += self._spent
        self._spent = 0.0


class TrafficRecorder:
    """Counts the n-grams of every window that is looked up, hit or miss alike, for each domain.

    Memory: a domain's sketch begins small and grows by steps while there is room, up to a quarter of
    ``max_bytes``; a full sketch forgets rare n-grams and says how much that can have cost. When a domain that
    has no sketch yet finds no room, the domain that was asked longest ago gives up its own: its counts go to
    ``spill``. Without ``spill`` its n-grams since its last drain are forgotten; its totals stay exact. The
    totals take some 200 bytes for each domain.

    Time: while counting takes more than ``max_share`` of wall time, only a random share of the sequences is
    counted, each with the inverse weight, so that counts stay unbiased. Totals are always exact.

    Thread-safe.
    """

    def __init__(
        self,
        window: int,
        *,
        max_bytes: int | str = DEFAULT_TRAFFIC_BYTES,
        max_share: float = 0.01,
        is_causal: bool = False,
        spill: Spill | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Takes no memory yet.

        Args:
            window: 2 or 3, as the tables have it.
            max_bytes: for the sketches of all domains together; at least 256 KiB.
            max_share: of wall time, above 0.
            is_causal: whether windows are those of a decoder.
            spill: see the class; called outside of all locks, on the thread that records.
            seed: of the choice of sequences.
            clock: seconds; another one for tests.

        Raises:
            InvalidSizeError: ``max_bytes`` is not understood.
            ValueError: a number is out of its range.
        """
        self.max_bytes = parse_bytes(max_bytes)
        if self.max_bytes < _LARGEST_SHARE * _SMALLEST_BYTES:
            raise ValueError(f"max_bytes must be at least 256 KiB, but is {self.max_bytes} bytes")
        if window not in (2, 3) or not max_share > 0:
            raise ValueError(f"window must be 2 or 3, not {window}, and max_share above 0, not {max_share}")
        self._window = window
        self._is_causal = is_causal
        self._spill = spill
        self._clock = clock
        self._lock = threading.Lock()
        self._domains: OrderedDict[str, _DomainTraffic] = OrderedDict()  # the last one asked comes last
        self._throttle = _Throttle(max_share, clock())
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def domains(self) -> tuple[str, ...]:
        """The domains that were asked since their last drain."""
        with self._lock:
            return tuple(self._domains)

    @property
    def probability(self) -> float:
        """The share of sequences that is counted now: 1, 1/2, 1/4, ..."""
        return self._throttle.probability

    @property
    def share_of_time(self) -> float:
        """Seconds that recording took, per second since the recorder was made."""
        with self._lock:
            return self._throttle.share(self._clock())

    @property
    def memory_bytes(self) -> int:
        """What the sketches take now: never more than ``max_bytes``."""
        with self._lock:
            sketches = [domain.sketch for domain in self._domains.values()]
            return sum(sketch.memory_bytes for sketch in sketches if sketch is not None)

    def record(self, sequences: PackedSequences, domains: Sequence[str], hits: torch.Tensor) -> None:
        """Counts a batch.

        Args:
            sequences: packed sequences of T tokens.
            domains: the domain of each sequence.
            hits: bool [T], whether a table held the window of each position. The last token of a sequence
                opens no window of two, and a decoder's first one is alone: false there.
        """
        spilled: list[tuple[str, TrafficCounts]] = []
        with self._lock:
            started = self._clock()
            sampled = self._sample(sequences.num_sequences)
            hits_by_sequence = _sum_by_sequence(hits, sequences)
            for domain, numbers in _group(domains).items():
                traffic = self._touch(domain)
                self._add_totals(traffic, sequences, numbers, hits_by_sequence)
                chosen = [number for number in numbers if sampled[number]]
                if chosen:
                    spilled += self._make_room(traffic, sum(sequences.lengths[number] for number in chosen))
                    self._add_windows(traffic, sequences, chosen)
            self._throttle.spend(started, self._clock())
        if self._spill:
            for domain, counts in spilled:
                self._spill(domain, counts)

    def weights_of(self, keys: torch.Tensor, domains: Sequence[str]) -> torch.Tensor:
        """How often n-grams were asked for in some domains since their last drain.

        Cheap enough for every batch: it may leave out the last ninth of a domain's tokens.

        Args:
            keys: int64 [M].
            domains: names; each counts once, and those without traffic count nothing.

        Returns:
            float64 [M].
        """
        with self._lock:
            asked = [self._domains[name] for name in dict.fromkeys(domains) if name in self._domains]
        weights = torch.zeros(len(keys), dtype=torch.float64)
        for traffic in asked:
            weights += traffic.weights_of(keys)
        return weights

    def drain(self, domain: str) -> TrafficCounts:
        """Returns what the domain was asked for since the last time, and forgets it."""
        with self._lock:
            traffic = self._domains.pop(domain, None)
        return TrafficCounts.none() if traffic is None else traffic.counts()

    def _sample(self, num_sequences: int) -> list[bool]:
        probability = self._throttle.probability
        if probability == 1:
            return [True] * num_sequences
        chosen: list[bool] = (torch.rand(num_sequences, generator=self._generator) < probability).tolist()
        return chosen

    def _touch(self, domain: str) -> _DomainTraffic:
        traffic = self._domains.setdefault(domain, _DomainTraffic())
        self._domains.move_to_end(domain)
        return traffic

    def _add_totals(
        self,
        traffic: _DomainTraffic,
        sequences: PackedSequences,
        numbers: Sequence[int],
        hits_by_sequence: Sequence[int],
    ) -> None:
        tokens = sum(sequences.lengths[number] for number in numbers)
        traffic.tokens += tokens
        # The last token of a sequence opens no bigram, and a decoder's first one follows none.
        traffic.windows += tokens - (len(numbers) if self._window == 2 or self._is_causal else 0)
        traffic.hits += sum(hits_by_sequence[number] for number in numbers)

    def _add_windows(
        self, traffic: _DomainTraffic, sequences: PackedSequences, numbers: Sequence[int]
    ) -> None:
        if traffic.sketch is not None:
            traffic.sketch.add_windows(
                sequences.input_ids,
                sequences.offsets,
                torch.tensor(numbers, dtype=torch.int64),
                window=self._window,
                is_causal=self._is_causal,
                weight=1 / self._throttle.probability,
            )

    def _make_room(self, traffic: _DomainTraffic, num_tokens: int) -> list[tuple[str, TrafficCounts]]:
        """Gives the domain a sketch, or a larger one if what comes may not fit; returns what had to go."""
        spilled = []
        if traffic.sketch is None:
            while self._free_bytes() < _SMALLEST_BYTES:
                spilled += self._evict_oldest()
            _enlarge(traffic, _SMALLEST_BYTES)
        expected = num_tokens * (1 if self._window == 2 else 2 if self._is_causal else 3)
        while _is_short(traffic, expected):
            larger = traffic.sketch_bytes * _GROWTH
            # For a moment there are the old and the new one.
            if larger > min(self._free_bytes(), self.max_bytes // _LARGEST_SHARE):
                break
            _enlarge(traffic, larger)
        return spilled

    def _free_bytes(self) -> int:
        return self.max_bytes - sum(domain.sketch_bytes for domain in self._domains.values())

    def _evict_oldest(self) -> list[tuple[str, TrafficCounts]]:
        oldest = next(name for name, domain in self._domains.items() if domain.sketch is not None)
        traffic = self._domains[oldest]
        if self._spill is None:
            traffic.sketch, traffic.sketch_bytes = None, 0
            return []
        del self._domains[oldest]
        return [(oldest, traffic.counts())]


def _group(domains: Sequence[str]) -> dict[str, list[int]]:
    """The sequence numbers of each domain."""
    groups: dict[str, list[int]] = {}
    for number, domain in enumerate(domains):
        groups.setdefault(domain, []).append(number)
    return groups


def _sum_by_sequence(hits: torch.Tensor, sequences: PackedSequences) -> list[int]:
    running = torch.cat([torch.zeros(1, dtype=torch.int64), hits.cumsum(0)])
    sums: list[int] = running[sequences.offsets].diff().tolist()
    return sums


def _is_short(traffic: _DomainTraffic, num_keys: int) -> bool:
    """Whether the sketch has forgotten something, or might if so many keys came."""
    sketch = traffic.sketch
    return sketch is not None and (
        sketch.max_error > traffic.inherited_error or len(sketch) + num_keys > sketch.max_items
    )


def _enlarge(traffic: _DomainTraffic, num_bytes: int) -> None:
    sketch = FrequencySketch(FrequencySketch.items_within(num_bytes))
    if traffic.sketch is not None:
        sketch.merge(traffic.sketch)
    traffic.sketch, traffic.sketch_bytes = sketch, num_bytes
    traffic.inherited_error = sketch.max_error
