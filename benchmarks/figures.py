"""Figures of the report, as SVG without dates, so that the same results give the same files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.result import Case, Curve

__all__ = ["draw_curves", "draw_rates"]

_STYLE: Any = {"svg.hashsalt": "hmi", "svg.fonttype": "path", "font.size": 9}
OURS, OTHERS = "#2a6f97", "#b8b8b8"


def draw_rates(case: Case, path: Path) -> Path:
    """Horizontal bars of the systems' rates with their intervals; ours are coloured. Returns ``path``."""
    systems = case.systems[::-1]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7, 0.9 + 0.34 * len(systems)), layout="constrained")
        axes = figure.subplots()
        values = [system.rate.value for system in systems]
        errors = [
            [max(0.0, system.rate.value - system.rate.low) for system in systems],
            [max(0.0, system.rate.high - system.rate.value) for system in systems],
        ]
        colors = [OURS if system.name.startswith(("HMI", "grouped")) else OTHERS for system in systems]
        axes.barh([system.name for system in systems], values, xerr=errors, color=colors, ecolor="#333333")
        axes.set_xlabel(f"{systems[0].unit} per second")
        axes.set_title(case.name, loc="left")
        _save(figure, path)
    return path


def draw_curves(curves: Sequence[Curve], path: Path) -> Path:
    """Lines over the x axis that the first of them names; where y is times as much, 1 is marked."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            axes.plot(curve.x, curve.y, marker="o", label=curve.name)
        axes.set_xscale(_x_scale(curves))
        if curves[0].y_unit == "times":
            axes.axhline(1.0, color="#333333", linestyle="--", linewidth=1)
            axes.set_ylim(bottom=0)
        elif curves[0].y_unit == "share":
            axes.set_ylim(0, 1)
        elif curves[0].y_scale == "log":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=min(0.0, *(min(curve.y) for curve in curves)))
        axes.set_xlabel(curves[0].x_label)
        axes.set_ylabel(curves[0].y_label)
        axes.grid(alpha=0.3)
        axes.legend()
        _save(figure, path)
    return path


def _x_scale(curves: Sequence[Curve]) -> str:
    """The scale that the first curve asks for; a logarithm has no place for 0."""
    return "linear" if any(min(curve.x) <= 0 for curve in curves) else curves[0].x_scale


def _save(figure: Figure, path: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="svg", metadata={"Date": None})
