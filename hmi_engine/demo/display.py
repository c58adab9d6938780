"""The demo's one table."""

from __future__ import annotations

import json
import shlex

from rich.console import Console
from rich.table import Table

from hmi_engine.demo.comparison import HMI_BACKOFF
from hmi_engine.demo.result import DemoResult

__all__ = ["print_result", "query_command"]


def print_result(result: DemoResult, console: Console) -> None:
    """Prints the table, what its figures mean, and how to query the store."""
    table = Table(
        title=f"HMI on {result.machine.cpu}, {result.machine.threads} threads", title_justify="left"
    )
    table.add_column("what", overflow="fold")
    table.add_column("measured", justify="right")
    table.add_column("compared with")
    table.add_column("so", justify="right")
    _add_accuracy(table, result)
    _add_size(table, result)
    _add_throughput(table, result)
    _add_hit_rates(table, result)
    console.print(table)
    for note in _notes(result):
        console.print(f"- {note}", markup=False, highlight=False, style="dim")
    console.print(f"\nThe store is {result.store}; ask it:", highlight=False)
    console.print(f"  {query_command(result)}", markup=False, highlight=False, soft_wrap=True)


def query_command(result: DemoResult) -> str:
    """A shell command that asks one of the trained tenants."""
    tenant = result.tenants[0]
    line = json.dumps(
        {"tenant": tenant.name, "text": "Open a connection to a server and wait for the reply."}
    )
    return f"echo {shlex.quote(line)} | hmi run {shlex.quote(result.store)}"


def _section(table: Table, title: str) -> None:
    table.add_section()
    table.add_row(f"[bold]{title}[/bold]")


def _add_accuracy(table: Table, result: DemoResult) -> None:
    _section(table, "Accuracy on held-out text (back-off)")
    for tenant in result.tenants:
        table.add_row(
            f"{tenant.name}: {len(tenant.labels)} labels, {tenant.num_test} texts",
            f"{tenant.accuracy:.1%}",
            f"majority class {tenant.majority:.1%}",
            f"{100 * (tenant.accuracy - tenant.majority):+.1f} points",
        )


def _add_size(table: Table, result: DemoResult) -> None:
    _section(table, "Size")
    size = max(tenant.bytes for tenant in result.tenants)
    table.add_row(
        "bytes of one tenant",
        _bytes(size),
        f"full copy of the model {_bytes(result.model_bytes)}",
        f"{size / result.model_bytes:.2%}",
    )
    num_tenants = len(result.tenants) + result.num_random_tenants
    table.add_row(
        f"store with {num_tenants} tenants and all tables",
        _bytes(result.store_bytes),
        f"as many full copies {_bytes(num_tenants * result.model_bytes)}",
        f"{result.store_bytes / (num_tenants * result.model_bytes):.1%}",
    )


def _add_throughput(table: Table, result: DemoResult) -> None:
    _section(table, f"Throughput, {result.num_stream_tenants} tenants mixed in each batch")
    ours = result.system(HMI_BACKOFF)
    for system in result.systems:
        low, high = system.texts_per_second_interval
        ratio = ""
        if system is not ours:
            times, least, most = ours.speed_over(system)
            ratio = f"{times:.2f}x ({least:.2f} to {most:.2f})"
        table.add_row(
            system.name,
            f"{system.texts_per_second:.0f} texts/s ({low:.0f} to {high:.0f})",
            f"{HMI_BACKOFF} is faster by" if ratio else "",
            ratio,
        )


def _add_hit_rates(table: Table, result: DemoResult) -> None:
    _section(table, "PLOT hit rate on the stream")
    meanings = {"backoff": "the rest is composed of tokens", "exact": "the rest is computed, and kept"}
    for rates in result.hit_rates:
        table.add_row(f"{rates.miss}: unigrams", f"{rates.unigram:.1%}", "rows of the whole vocabulary", "")
        table.add_row(f"{rates.miss}: bigrams", f"{rates.bigram:.1%}", meanings[rates.miss], "")


def _notes(result: DemoResult) -> list[str]:
    notes = [
        f"Text: {result.text_source}.",
        "The majority class is that of the held-out texts themselves; accuracies are of HMI as it serves.",
        "All systems got the same weights, texts, tokenizer, threads and batches in turn; medians of "
        f"{len(result.systems[0].seconds)} repetitions with new text each, and 95 % bootstrap intervals.",
        f"The peers compute all {result.num_layers} layers; HMI looks {result.plot_layers} of them up: its "
        "answers are its own, and its tenants are trained that way. The base is "
        + (
            "distilled to that (docs/distillation.md), on other text."
            if result.is_distilled
            else "not distilled to that, which costs accuracy: see `hmi distill`."
        ),
        f"{result.num_random_tenants} tenants have random weights, for size and speed alone.",
    ]
    if result.num_repeated_texts:
        notes.append(
            f"{result.num_repeated_texts} texts of the stream came more than once (too few held-out texts), "
            "which flatters HMI exact."
        )
    if result.num_bad_lines:
        notes.append(f"{result.num_bad_lines} lines of the data were no usable example and were left out.")
    return notes


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("KB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
