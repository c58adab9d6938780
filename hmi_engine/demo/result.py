"""What the demo found, for programs (``hmi demo --json``) and for the table."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from hmi_engine.demo.environment import Machine, Versions
from hmi_engine.demo.timing import median, median_interval, ratio_interval

__all__ = ["DemoResult", "DomainResult", "HitRates", "SystemResult", "TenantResult"]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DomainResult(_Frozen):
    """A domain of the store's tree and its table."""

    name: str
    parent: str
    corpus_tokens: int
    rows: int
    bytes: int


class TenantResult(_Frozen):
    """A trained tenant; ``majority`` is what the best constant answer reaches on the same held-out texts."""

    name: str
    domain: str
    question: str
    labels: tuple[str, ...]
    num_train: int
    num_test: int
    accuracy: float
    majority: float
    bytes: int
    training_seconds: float


class SystemResult(_Frozen):
    """One system's time for the same mixed stream.

    Attributes:
        name: the system.
        description: how it was set up.
        seconds: for each repetition; repetition i is the same text for all systems, new to all.
        num_texts: texts in a repetition.
    """

    name: str
    description: str
    seconds: tuple[float, ...]
    num_texts: int

    @property
    def texts_per_second(self) -> float:
        """Median throughput."""
        return self.num_texts / median(self.seconds)

    @property
    def texts_per_second_interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the median throughput."""
        low, high = median_interval(self.seconds)
        return self.num_texts / high, self.num_texts / low

    def speed_over(self, other: SystemResult) -> tuple[float, float, float]:
        """This system's speed over another's: ratio of medians, and its 95 % bootstrap interval."""
        ratio = median(other.seconds) / median(self.seconds)
        return (ratio, *ratio_interval(other.seconds, self.seconds))


class HitRates(_Frozen):
    """Share of the stream's n-grams whose row was found, by their length; the rest is as ``miss`` says."""

    miss: str
    unigram: float
    bigram: float
    num_bigrams: int


class DemoResult(_Frozen):
    """Everything the demo measured."""

    store: str
    model: str
    text_source: str
    num_layers: int
    plot_layers: int
    is_distilled: bool
    window: int
    model_bytes: int
    store_bytes: int
    num_random_tenants: int
    random_tenant_bytes: int
    domains: tuple[DomainResult, ...]
    tenants: tuple[TenantResult, ...]
    systems: tuple[SystemResult, ...]
    hit_rates: tuple[HitRates, ...]
    num_stream_tenants: int
    num_repeated_texts: int
    num_bad_lines: int
    seconds: float
    machine: Machine
    versions: Versions

    def system(self, name: str) -> SystemResult:
        """The system of this name. Raises KeyError if it was not measured."""
        for system in self.systems:
            if system.name == name:
                return system
        raise KeyError(name)
