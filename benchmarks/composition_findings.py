"""What the composition study found, and how it is told: figures, differences with their errors, curves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev

from benchmarks.composition_tasks import BASELINES
from benchmarks.result import Curve, Quantity

__all__ = ["MIB", "Figures", "Findings", "collect", "curves", "merged_findings", "quantities"]

MIB = 1 << 20

Figures = dict[str, list[float]]
"""Figures by name, one for each set (and seed)."""


def collect(into: Figures, found: Mapping[str, float]) -> None:
    """Adds one figure to each name."""
    for name, value in found.items():
        into.setdefault(name, []).append(value)


@dataclass(frozen=True)
class Findings:
    """What was measured at K = N/2, by what it is, then by name: one figure for each set (and seed)."""

    errors: Figures = field(default_factory=dict)
    errors_after: Figures = field(default_factory=dict)
    shares: Figures = field(default_factory=dict)
    hit_rates: Figures = field(default_factory=dict)
    budgets: dict[str, Figures] = field(default_factory=dict)
    accuracies: dict[str, Figures] = field(default_factory=dict)
    coverage: dict[str, dict[str, Figures]] = field(default_factory=dict)


def merged_findings(found: Sequence[Findings]) -> Findings:
    """The findings of several sets together, in their order."""
    merged = Findings()
    for findings in found:
        for into, figures in (
            (merged.errors, findings.errors),
            (merged.errors_after, findings.errors_after),
            (merged.shares, findings.shares),
            (merged.hit_rates, findings.hit_rates),
            *((merged.budgets.setdefault(name, {}), figures) for name, figures in findings.budgets.items()),
        ):
            for name, values in figures.items():
                into.setdefault(name, []).extend(values)
        merged.accuracies.update(findings.accuracies)
        for curve, by_set in findings.coverage.items():
            merged.coverage.setdefault(curve, {}).update(by_set)
    return merged


def quantities(findings: Findings, layers: Mapping[int, Mapping[str, float]]) -> Iterable[Quantity]:
    """Every figure by name, the mean over sets; ``layers`` holds the probe's by number of domain layers."""
    for name, rates in findings.hit_rates.items():
        yield Quantity(name=name, value=rates[0], unit="share")
    for name, values in findings.errors.items():
        after = mean(findings.errors_after[name])
        yield Quantity(
            name=f"row error, {name} (after LayerNorm {after:.1%})", value=mean(values), unit="share"
        )
    for name, values in findings.shares.items():
        yield Quantity(name=f"probe, {name}", value=mean(values), unit="share")
    for depth, shares in layers.items():
        for name, value in shares.items():
            yield Quantity(name=f"probe, K = {depth}, {name}", value=value, unit="share")
    yield from _accuracies(findings.accuracies)


def _accuracies(found: Mapping[str, Figures]) -> Iterable[Quantity]:
    """Mean over sets and seeds, each set's own mean, and the difference from today's rule of that width."""
    for name in next(iter(found.values())):
        runs = [value for figures in found.values() for value in figures[name]]
        by_set = ", ".join(f"{which} {mean(figures[name]):.1%}" for which, figures in found.items())
        yield Quantity(name=f"accuracy, {name} ({by_set})", value=mean(runs), unit="share")
    for width, baseline in BASELINES.items():
        for name in next(iter(found.values())):
            if name == baseline or not name.startswith(f"window {width}"):
                continue
            differences = [
                100 * (ours - today)
                for figures in found.values()
                for ours, today in zip(figures[name], figures[baseline], strict=True)
            ]
            spread = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
            yield Quantity(
                name=f"accuracy over today's rule, {name}",
                value=mean(differences),
                unit=f"points, +- {spread:.1f}",
            )


def curves(findings: Findings, rates: Sequence[float], budgets: Sequence[int]) -> Iterable[Curve]:
    """Accuracy over the share ``rates`` of n-grams held, and the probe over ``budgets`` in bytes."""
    for name, by_set in findings.coverage.items():
        for figure, figures in [
            ("coverage", _mean_of(by_set)),
            *((f"coverage-{s}", f) for s, f in by_set.items()),
        ]:
            yield Curve(
                figure=figure,
                name=name,
                x_label="% of n-grams in the table",
                y_label="accuracy on held-out texts",
                x=tuple(100 * rate for rate in rates),
                y=tuple(mean(figures[str(rate)]) for rate in rates),
                x_scale="linear",
            )
    for name, figures in findings.budgets.items():
        yield Curve(
            figure="budget",
            name=name,
            x_label="bytes of rows, MiB",
            y_label="probe: share of variance recovered",
            x=tuple(budget / MIB for budget in budgets),
            y=tuple(mean(figures[str(budget)]) for budget in budgets),
        )


def _mean_of(by_set: Mapping[str, Figures]) -> Figures:
    names = next(iter(by_set.values()))
    return {name: [mean(figures[name]) for figures in by_set.values()] for name in names}
