"""How fast each miss policy is, from no hits to nothing but hits, beside the plain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.result import Case, Curve, Quantity, Ratio, System
from hmi_engine.demo.timing import interleave
from hmi_engine.engine import Engine
from hmi_engine.errors import HmiError
from hmi_engine.knowledge.adapters import Adapter
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.knowledge.heads import ClassificationHead
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.packing import PackedSequences
from hmi_engine.pipeline.step import MissPolicy
from hmi_engine.request import Request
from hmi_engine.store import Store

__all__ = ["POLICIES", "break_even", "throughput"]

PLAIN = "plain model, K = 0"
WARM_UP = 1


@dataclass(frozen=True)
class Policy:
    """How an engine treats misses."""

    miss: MissPolicy
    exact_budget: float = 0.0


POLICIES: Mapping[str, Policy] = {
    "exact": Policy("exact"),
    "budget 0.2": Policy("budget", 0.2),
    "budget 0.05": Policy("budget", 0.05),
    "back-off": Policy("backoff"),
}


def throughput(
    store: Store,
    plain: Store,
    rounds: Sequence[Sequence[str]],
    shares: Sequence[float],
) -> tuple[list[Case], list[Curve], list[Quantity]]:
    """One case for each share of the windows that a table is to hold, and what they say together.

    Args:
        store: a store with domain layers; gets domains and tenants.
        plain: a store of the same model with K = 0.
        rounds: texts, new ones for each repetition; the first ``WARM_UP`` rounds are not timed.
        shares: of the windows of all texts that the tables are to hold, ascending; 0 is the root's table.
    """
    add_tenant(plain, ROOT_DOMAIN)
    token_ids = [store.encoder.token_ids(list(texts)) for texts in rounds]
    cases, found = [], []
    for share, domain in _tables(store, [text for texts in rounds for text in texts], shares).items():
        found.append(_hit_rate(store, domain, token_ids))
        with ExitStack() as stack:
            engines = {
                name: stack.enter_context(Engine(store, miss=policy.miss, exact_budget=policy.exact_budget))
                for name, policy in POLICIES.items()
            }
            engines[PLAIN] = stack.enter_context(Engine(plain))
            add_tenant(store, domain)
            cases.append(_case(engines, domain, token_ids, found[-1], share, store.general.window))
    curves = [_curve(name, cases, found, store.general.window) for name in POLICIES]
    return cases, curves, [_break_even_quantity(curve, store.general.window) for curve in curves]


def add_tenant(store: Store, domain: str) -> None:
    """A tenant named like its domain: the base itself, with a small head."""
    hidden = store.general.hidden_size
    head = ClassificationHead(("no", "yes"), torch.zeros(2, hidden), torch.zeros(2), "cls")
    store.add_tenant(domain, domain=domain, adapter=Adapter({}), head=head, replace=True)


def _tables(store: Store, texts: Sequence[str], shares: Sequence[float]) -> dict[float, str]:
    """Domains whose tables hold the most frequent windows of the texts, cut at growing shares."""
    domains = {share: ROOT_DOMAIN for share in shares if share == 0}
    whole = "all"
    store.add_domain(whole, iter(texts), min_count=1, plot_bytes="16GiB")
    with PlotLibrary(store.layout, store.catalog, store.general).reading([whole]) as view:
        table = view.table(whole)
        if table is None:
            raise HmiError(f"the store at {store.layout.root} has no domain layers")
        counts = table.row_counts.sort(descending=True).values
    mass = counts.cumsum(0) / counts.sum()
    for share in shares:
        if share == 1:
            domains[share] = whole
        elif share > 0:
            rows = int((mass < share).sum()) + 1
            domains[share] = f"share-{share:g}"
            plot_bytes = store.domains[whole].bytes * rows // len(counts)
            store.add_domain(
                domains[share],
                iter(texts),
                min_count=1,
                plot_bytes=plot_bytes,
                row_format=store.general.row_dtype,
            )
    return dict(sorted(domains.items()))


def _hit_rate(store: Store, domain: str, rounds: Sequence[Sequence[list[int]]]) -> float:
    """Share of the texts' windows of full width that the domain's table holds."""
    sequences = PackedSequences.pack([ids for texts in rounds for ids in texts])
    library = PlotLibrary(store.layout, store.catalog, store.general)
    with library.reading([domain]) as view:
        found = view.lookup(sequences, [domain] * sequences.num_sequences)[:, 0] >= 0
    windows = sequences.num_tokens - (sequences.num_sequences if store.general.window == 2 else 0)
    return float(found.sum()) / windows


def _case(
    engines: Mapping[str, Engine],
    domain: str,
    rounds: Sequence[Sequence[list[int]]],
    hit_rate: float,
    share: float,
    window: int,
) -> Case:
    def serve(name: str, number: int) -> None:
        tenant = ROOT_DOMAIN if name == PLAIN else domain
        responses = engines[name].run([Request(tenant, input_ids=ids) for ids in rounds[number]])
        for response in responses:
            if response.error is not None:
                raise response.error

    seconds = interleave(
        {name: lambda number, name=name: serve(name, number) for name in engines},  # type: ignore[misc]
        len(rounds) - WARM_UP,
        warm_up=WARM_UP,
    )
    work = [sum(map(len, texts)) for texts in rounds[WARM_UP:]]
    measured = {
        name: System.of(name, _description(engines[name]), seconds[name], work, "tokens") for name in engines
    }
    return Case(
        name=f"window {window}, {hit_rate:.0%} of windows in the table",
        settings={"window": window, "share_aimed_at": share, "hit_rate": hit_rate},
        systems=tuple(measured.values()),
        ratios=tuple(Ratio.of(measured[name], measured[PLAIN]) for name in POLICIES),
    )


def _description(engine: Engine) -> str:
    plot = engine.stats().plot
    if plot is None or not engine.store.general.plot_layers:
        return "every layer computed"
    tokens = max(1, plot["tokens"])
    return (
        f"{plot['window_hits'] / max(1, plot['windows']):.0%} found, "
        f"{plot['windows_computed'] / tokens:.3f} windows computed per token"
    )


def _curve(name: str, cases: Sequence[Case], found: Sequence[float], window: int) -> Curve:
    times = [next(ratio.times.value for ratio in case.ratios if ratio.faster == name) for case in cases]
    return Curve(
        figure=f"throughput_window{window}",
        name=name,
        x_label="% of windows in the table",
        y_label="tokens a second, over the plain model's",
        x=tuple(100 * share for share in found),
        y=tuple(times),
        x_scale="linear",
        y_unit="times",
    )


def break_even(x: Sequence[float], times: Sequence[float]) -> float | None:
    """Where the line through the points first reaches 1 for good, in units of x; None if it never does.

    ``x`` ascends. 0 says that it is never below.
    """
    below = [number for number, value in enumerate(times) if value < 1]
    if not below:
        return 0.0
    last = below[-1]
    if last == len(times) - 1:
        return None
    return float(np.interp(1.0, times[last : last + 2], x[last : last + 2]))


def _break_even_quantity(curve: Curve, window: int) -> Quantity:
    place = break_even(curve.x, curve.y)
    name = f"window {window}, {curve.name}: as fast as the plain model from this share of hits on"
    if place is None:
        return Quantity(name=f"{name} (never: largest ratio)", value=max(curve.y), unit="times")
    return Quantity(name=name, value=place / 100, unit="share")
