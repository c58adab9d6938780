"""The one format of all benchmark results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, JsonValue

from hmi_engine.demo.environment import Machine, Versions, describe_machine, installed_versions
from hmi_engine.demo.timing import median, median_interval, ratio_interval
from hmi_engine.knowledge.atomic import atomic_write

__all__ = [
    "BenchmarkResult",
    "Case",
    "CommandLine",
    "Curve",
    "Interval",
    "Quantity",
    "Ratio",
    "System",
    "Table",
    "read_results",
]


class CommandLine(Protocol):
    """What results keep of a benchmark's options."""

    @property
    def command(self) -> str:
        """How to repeat the run."""

    @property
    def quick(self) -> bool:
        """Whether sizes were small, to prove that everything runs."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(_Frozen):
    """A median, or a ratio of medians, and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class System(_Frozen):
    """One system in one case: raw samples and what follows from them.

    Attributes:
        name: the system.
        description: how it was set up.
        seconds: raw samples; sample i of all systems of a case is from the same repetition and input.
        work: how much it did in one repetition, in ``unit``; repetitions may differ.
        unit: such as ``texts``, ``tokens``, ``flop``.
        rate: median of work per second.
    """

    name: str
    description: str
    seconds: tuple[float, ...]
    work: tuple[float, ...]
    unit: str
    rate: Interval

    @classmethod
    def of(
        cls, name: str, description: str, seconds: Sequence[float], work: Sequence[float], unit: str
    ) -> System:
        """Derives the rate from raw samples."""
        rates = [amount / taken for amount, taken in zip(work, seconds, strict=True)]
        low, high = median_interval(rates)
        return cls(
            name=name,
            description=description,
            seconds=tuple(seconds),
            work=tuple(work),
            unit=unit,
            rate=Interval(value=median(rates), low=low, high=high),
        )

    def rates(self) -> list[float]:
        """Work per second of each repetition."""
        return [amount / taken for amount, taken in zip(self.work, self.seconds, strict=True)]


class Ratio(_Frozen):
    """How many times as fast ``faster`` is as ``baseline``: median rate over median rate."""

    faster: str
    baseline: str
    times: Interval

    @classmethod
    def of(cls, system: System, baseline: System) -> Ratio:
        """Derives the ratio and its interval from paired repetitions."""
        low, high = ratio_interval(system.rates(), baseline.rates())
        value = system.rate.value / baseline.rate.value
        return cls(
            faster=system.name, baseline=baseline.name, times=Interval(value=value, low=low, high=high)
        )


class Case(_Frozen):
    """Systems measured interleaved on the same inputs."""

    name: str
    settings: dict[str, JsonValue]
    systems: tuple[System, ...]
    ratios: tuple[Ratio, ...] = ()


class Quantity(_Frozen):
    """A figure that is no time, such as a hit rate."""

    name: str
    value: float
    unit: str

    def __str__(self) -> str:
        """Name and value, as commands print them."""
        shown = f"{self.value:.1%}" if self.unit == "share" else f"{self.value:.1f} {self.unit}"
        return f"{self.name}: {shown}"


class Curve(_Frozen):
    """Points of one line of a figure.

    ``y_unit`` says what y is: a share (0 to 1), times as much as something that is 1 (drawn as a line), or
    any other number, of which ``y_label`` tells the unit.
    """

    figure: str
    name: str
    x_label: str
    y_label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    x_scale: Literal["log", "linear"] = "log"
    y_scale: Literal["log", "linear"] = "linear"
    y_unit: Literal["share", "times", "number"] = "share"


class Table(_Frozen):
    """Figures of which several belong to each thing; each row has a text and then one number a column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]

    def lines(self) -> list[str]:
        """Title, columns and rows; an empty cell is a dash."""
        return [self.title, *("  ".join(map(_shown, row)) for row in (self.columns, *self.rows))]


def _shown(cell: str | float | None) -> str:
    if cell is None:
        return "-"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


class BenchmarkResult(_Frozen):
    """What one benchmark found, how, and on what."""

    name: str
    question: str
    command: str
    is_quick: bool
    machine: Machine
    versions: Versions
    settings: dict[str, JsonValue]
    notes: tuple[str, ...]
    cases: tuple[Case, ...]
    quantities: tuple[Quantity, ...] = ()
    curves: tuple[Curve, ...] = ()
    tables: tuple[Table, ...] = ()

    @classmethod
    def of(
        cls,
        arguments: CommandLine,
        name: str,
        question: str,
        *,
        settings: dict[str, JsonValue],
        notes: Sequence[str],
        cases: Sequence[Case] = (),
        quantities: Sequence[Quantity] = (),
        curves: Sequence[Curve] = (),
        tables: Sequence[Table] = (),
    ) -> BenchmarkResult:
        """What was found on this machine, with what is installed on it."""
        return cls(
            name=name,
            question=question,
            command=arguments.command,
            is_quick=arguments.quick,
            machine=describe_machine(),
            versions=installed_versions(),
            settings=settings,
            notes=tuple(notes),
            cases=tuple(cases),
            quantities=tuple(quantities),
            curves=tuple(curves),
            tables=tuple(tables),
        )

    def ratio_lines(self) -> list[str]:
        """Every ratio of every case in words, as commands print them."""
        return [
            f"{case.name}: {ratio.faster} is {ratio.times.value:.2f} x {ratio.baseline}"
            for case in self.cases
            for ratio in case.ratios
        ]

    def table_lines(self) -> list[str]:
        """Every table, its title and columns first, as commands print them."""
        return [line for table in self.tables for line in table.lines()]

    def write(self, path: Path) -> None:
        """Writes the result as JSON, atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = self.model_dump_json(indent=1) + "\n"

        def write_text(partial: Path) -> None:
            partial.write_text(text)

        atomic_write(path, write_text)


def read_results(folder: Path) -> list[BenchmarkResult]:
    """Reads every result of a folder, by name.

    Raises pydantic's ValidationError for a file of another format.
    """
    return [BenchmarkResult.model_validate_json(path.read_text()) for path in sorted(folder.glob("*.json"))]
