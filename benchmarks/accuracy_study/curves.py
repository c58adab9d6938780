"""Curves of the accuracy study: points lost against full fine-tuning, by layers looked up and by hits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

from benchmarks.accuracy_study.methods import Method, TableText, WholeBase, looked_up
from benchmarks.accuracy_study.report import StudyReport
from benchmarks.result import Curve

__all__ = ["curves"]

LOST = "points below full fine-tuning, mean of the sets"
_BASES = {"distilled": True, "undistilled": False}
_TABLES: tuple[TableText, ...] = ("quarter", "half", "own", "all")


def curves(report: StudyReport) -> list[Curve]:
    """Those whose every point is measured on all sets."""
    return [*_by_layers(report), *_by_hits(report)]


def _by_layers(report: StudyReport) -> list[Curve]:
    found = []
    for name, is_distilled in _BASES.items():
        own = [looked_up(plot_layers, is_distilled=is_distilled) for plot_layers in (2, 3, 4)]
        found += [
            _curve(report, f"{name}, back-off", own),
            _curve(report, f"{name}, exact", [replace(method, miss="exact") for method in own]),
        ]
    whole = WholeBase()
    found.append(_curve(report, whole.title, [whole] * 3))
    return [curve for curve in found if curve is not None]


def _curve(report: StudyReport, name: str, methods: Sequence[Method]) -> Curve | None:
    found = _lost(report, methods)
    if found is None:
        return None
    lost, seeds = found
    return Curve(
        figure="lost-by-layers",
        name=f"{name} ({seeds})",
        x_label="layers looked up, % of all",
        y_label=LOST,
        x=(100 / 3, 50.0, 200 / 3),
        y=lost,
        x_scale="linear",
        y_unit="number",
    )


def _by_hits(report: StudyReport) -> list[Curve]:
    curves = []
    for name, is_distilled in _BASES.items():
        base = looked_up(3, is_distilled=is_distilled)
        methods = [replace(base, table=table) for table in _TABLES]
        found = _lost(report, methods)
        if found is not None:
            lost, seeds = found
            curves.append(
                Curve(
                    figure="lost-by-hits",
                    name=f"{name}, K = 3, back-off ({seeds})",
                    x_label="bigrams found, %, mean of the sets",
                    y_label=LOST,
                    x=tuple(100 * mean(report.hit_rates(method)) for method in methods),
                    y=lost,
                    x_scale="linear",
                    y_unit="number",
                )
            )
    return curves


def _lost(report: StudyReport, methods: Sequence[Method]) -> tuple[tuple[float, ...], str] | None:
    """Points lost by each, of the seeds that all have, and how many these are; None if one is missing.

    With seeds of its own each, a curve would show what the seeds differ by.
    """
    seeds = report.common_seeds(methods)
    lost = [report.lost_points(method, seeds) for method in methods]
    values = tuple(interval.value for interval in lost if interval is not None)
    if len(values) < len(methods):
        return None
    fewest = min(map(len, seeds.values()))
    return values, "one seed" if fewest == 1 else f"{fewest} seeds"
