"""A picture of an engine's trace: one row for each thread's stages, and one for the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

__all__ = ["draw_trace"]

_STYLE: Any = {"svg.hashsalt": "hmi", "svg.fonttype": "path", "font.size": 9}
_ROWS = ("layers", "respond", "compute", "search", "fetch", "tokenise")
_COLORS = {
    "tokenise": "#8d99ae",
    "fetch": "#e07a5f",
    "search": "#f2cc8f",
    "compute": "#2a6f97",
    "respond": "#81b29a",
    "layers": "#89c2d9",
}


def draw_trace(trace: Path, path: Path, *, seconds: float) -> Path:
    """Draws the last ``seconds`` of a trace that an engine wrote, a number in each batch's spans."""
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    end = max(event["ts"] + event["dur"] for event in events)
    begin = end - 1e6 * seconds
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 2.8), layout="constrained")
        axes = figure.subplots()
        for event in events:
            row = "layers" if event["name"].startswith("layer") else event["name"]
            if row not in _ROWS or event["ts"] < begin:
                continue
            left, width = (event["ts"] - begin) / 1e3, event["dur"] / 1e3
            axes.barh(_ROWS.index(row), width, left=left, height=0.8, color=_COLORS[row], edgecolor="white")
            if "batch" in event["args"] and width > 1e3 * seconds / 60:
                axes.text(
                    left + width / 2, _ROWS.index(row), event["args"]["batch"], ha="center", va="center"
                )
        axes.set_yticks(range(len(_ROWS)), _ROWS)
        axes.set_xlim(0, 1e3 * seconds)
        axes.set_xlabel("milliseconds; the numbers are those of the batches")
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path
