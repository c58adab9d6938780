"""Writes ``docs/results.md`` and its figures from the results of the benchmarks, and from nothing else."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.arguments import RESULTS
from benchmarks.figures import draw_curves, draw_rates
from benchmarks.gpu.section import gpu_section
from benchmarks.result import BenchmarkResult, Case, Curve, Interval, Table, read_results
from hmi_engine.knowledge.atomic import atomic_write

__all__ = ["main", "render"]

DOCS = Path("docs")
HEADER = """# Results

This page is written by `python -m benchmarks.report` from the JSON files below `benchmarks/results`; edit
nothing here.
A rate is the median over repetitions with its 95 % bootstrap interval; the systems of a table were timed in
turn (A B C, B C A, ...) in one process. A ratio is that of median rates.
"""
EMPTY = "\nNo results yet: run the benchmarks first.\n"
QUICK_WARNING = "**These figures are of a `--quick` run, which proves that it works and measures nothing.**"
ORDER = (
    "mixed",
    "tenants",
    "pipeline",
    "load",
    "simulate",
    "neighbours",
    "generation",
    "shared_prompts",
    "perplexity",
    "residency",
    "tenant_store",
    "accuracy",
    "few_examples",
    "joint_training",
    "plot",
    "coverage_growth",
    "drift",
    "miss",
    "composition",
    "merge_forms",
    "compression",
    "counting",
    "materialise",
    "parity",
    "kernels",
)
"""What people ask first comes first; other results follow by name."""

MANY_CASES = 8
"""More cases than that share one table, a row each."""

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def render(results: Sequence[BenchmarkResult], figures: Path, *, relative_to: Path) -> str:
    """The page's Markdown; draws figures into ``figures``, linked as seen from ``relative_to``."""
    parts = [HEADER]
    for result in sorted(results, key=_place):
        parts.extend(_result(result, figures, relative_to))
    return "\n".join(parts) + ("" if results else EMPTY)


def _place(result: BenchmarkResult) -> tuple[int, str]:
    return ORDER.index(result.name) if result.name in ORDER else len(ORDER), result.name


def _result(result: BenchmarkResult, figures: Path, relative_to: Path) -> list[str]:
    parts = [f"## {result.question}", ""]
    if result.is_quick:
        parts += [QUICK_WARNING, ""]
    parts += [*_provenance(result), ""]
    parts += [*(f"- {note}" for note in result.notes), ""]
    if len(result.cases) > MANY_CASES:
        parts += [*_summary_table(result.cases), ""]
    else:
        for case in result.cases:
            parts += _case(case, result.name, figures, relative_to)
    for table in result.tables:
        parts += [f"### {table.title}", "", *_table(table), ""]
    if result.quantities:
        parts += ["### Other figures", "", "| what | value |", "| --- | ---: |"]
        parts += [f"| {item.name} | {_quantity(item.value, item.unit)} |" for item in result.quantities]
        parts.append("")
    for figure in dict.fromkeys(curve.figure for curve in result.curves):
        curves = [curve for curve in result.curves if curve.figure == figure]
        parts += [_image(draw_curves(curves, figures / f"{result.name}-{figure}.svg"), relative_to), ""]
        parts += [f"| {curves[0].x_label} | " + " | ".join(curve.name for curve in curves) + " |"]
        parts += ["| ---: |" + " ---: |" * len(curves)]
        for index, x in enumerate(curves[0].x):
            parts.append(f"| {x:,.0f} | " + " | ".join(_point(curve, index) for curve in curves) + " |")
        parts.append("")
    return parts


def _table(table: Table) -> list[str]:
    rule = "| --- |" + " ---: |" * (len(table.columns) - 1)
    rows = [f"| {' | '.join(map(_cell, row))} |" for row in table.rows]
    return [f"| {' | '.join(table.columns)} |", rule, *rows]


def _cell(value: str | float | None) -> str:
    """Small numbers, such as errors, by their power of ten."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.4g}"


def _point(curve: Curve, index: int) -> str:
    if curve.y_unit == "number":
        return _cell(curve.y[index])
    return f"{curve.y[index]:.2f}x" if curve.y_unit == "times" else f"{curve.y[index]:.1%}"


def _provenance(result: BenchmarkResult) -> list[str]:
    machine, packages = result.machine, result.versions.packages
    versions = ", ".join(f"{name} {number}" for name, number in packages.items())
    return [
        f"Command: `{result.command}`  ",
        f"Machine: {machine.cpu}, {machine.cores} cores, {machine.threads} threads, torch SIMD "
        f"{machine.torch_simd}, kernels SIMD {machine.kernels_simd}, {machine.memory_bytes / 2**30:.0f} GiB, "
        f"{machine.system}, device {machine.device}  ",
        f"Versions: Python {result.versions.python}, {versions}  ",
        f"Settings: {_pairs(result.settings)}",
    ]


def _case(case: Case, result_name: str, figures: Path, relative_to: Path) -> list[str]:
    parts = [f"### {case.name[:1].upper()}{case.name[1:]}", ""]
    parts += [*_case_table(case), "", _settings(case), ""]
    if len(case.systems) > 3:
        picture = draw_rates(case, figures / f"{result_name}-{_slug(case.name)}.svg")
        parts += [_image(picture, relative_to), ""]
    return parts


def _summary_table(cases: Sequence[Case]) -> list[str]:
    """One row for each case: the rate of its first system, and that over each of the others."""
    baselines = list(dict.fromkeys(ratio.baseline for case in cases for ratio in case.ratios))
    header = ["case", "system", f"{cases[0].systems[0].unit}/s", *(f"over {name}" for name in baselines)]
    lines = [f"| {' | '.join(header)} |", "| --- | --- |" + " ---: |" * (1 + len(baselines))]
    for case in cases:
        ours = case.systems[0]
        times = {ratio.baseline: ratio.times for ratio in case.ratios if ratio.faster == ours.name}
        cells = [_times(times[name]) if name in times else "" for name in baselines]
        lines.append(f"| {' | '.join([case.name, ours.name, _rate(ours.rate), *cells])} |")
    return lines


def _case_table(case: Case) -> list[str]:
    baselines = list(dict.fromkeys(ratio.faster for ratio in case.ratios))
    header = "| system | set-up | " + " | ".join(
        [f"{case.systems[0].unit}/s", *(f"{name} over it" for name in baselines)]
    )
    lines = [f"{header} |", "| --- | --- | " + " | ".join("---:" for _ in range(1 + len(baselines))) + " |"]
    for system in case.systems:
        cells = [system.name, system.description, _rate(system.rate)]
        for name in baselines:
            found = [r.times for r in case.ratios if (r.faster, r.baseline) == (name, system.name)]
            cells.append(_times(found[0]) if found else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _settings(case: Case) -> str:
    samples = sorted({len(system.seconds) for system in case.systems})
    return f"{'/'.join(map(str, samples))} repetitions; {_pairs(case.settings)}."


def _pairs(settings: Mapping[str, object]) -> str:
    return "; ".join(f"{name.replace('_', ' ')}: {_value(value)}" for name, value in settings.items())


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "/".join(_value(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _rate(rate: Interval) -> str:
    scale, prefix = next(((scale, name) for scale, name in _PREFIXES if rate.value >= scale), (1.0, ""))
    value = f"{rate.value / scale:.3g} {prefix}".rstrip()
    return f"{value} ({rate.low / scale:.3g} to {rate.high / scale:.3g})"


def _times(times: Interval) -> str:
    return f"{times.value:.2f}x ({times.low:.2f} to {times.high:.2f})"


def _quantity(value: float, unit: str) -> str:
    if unit == "share":
        return f"{value:.1%}"
    return f"{value:.2f} {unit}" if abs(value) < 10 else f"{value:.1f} {unit}"


def _slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name.lower()).split())


def _image(path: Path, relative_to: Path) -> str:
    return f"![{path.stem.replace('-', ' ')}]({path.relative_to(relative_to).as_posix()})"


def main(argv: Sequence[str] | None = None) -> None:
    """Reads all results and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the benchmarks' JSON files")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder that gets results.md and figures/")
    options = parser.parse_args(argv)
    figures = options.docs / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    text = render(read_results(options.results), figures, relative_to=options.docs)
    text += "\n" + "\n".join(gpu_section(options.results / "gpu")).rstrip() + "\n"

    def write_text(partial: Path) -> None:
        partial.write_text(text)

    atomic_write(options.docs / "results.md", write_text)
    print(f"wrote {options.docs / 'results.md'}")


if __name__ == "__main__":
    main()
