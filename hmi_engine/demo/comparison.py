"""Times HMI and its peers in turn on one mixed stream, with the same weights, texts and threads."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hmi_engine.demo.peers import HmiPeer, OneModelPerTenant, Peer, PeftMixedBatch, answer_stream, tune
from hmi_engine.demo.peers.export import export_tenants
from hmi_engine.demo.peers.interface import ServedTenant
from hmi_engine.demo.progress import DemoProgress
from hmi_engine.demo.result import HitRates, SystemResult
from hmi_engine.demo.settings import DemoSettings
from hmi_engine.demo.stream import MixedStream, StreamSource, cut_to_tokens
from hmi_engine.demo.timing import interleave
from hmi_engine.engine import Engine
from hmi_engine.errors import MissPolicyWarning
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.request import Request
from hmi_engine.store import Store

__all__ = ["HMI_BACKOFF", "HMI_EXACT", "Comparison", "compare"]

HMI_BACKOFF = "HMI back-off"
HMI_EXACT = "HMI exact"
WARM_UP = 1


@dataclass(frozen=True)
class Comparison:
    """Times of all systems, hit rates of both of HMI's policies, and how many texts came more than once."""

    systems: tuple[SystemResult, ...]
    hit_rates: tuple[HitRates, ...]
    num_repeated_texts: int


def compare(
    store: Store,
    tenants: Mapping[str, str],
    texts: Mapping[str, Sequence[str]],
    settings: DemoSettings,
    progress: DemoProgress,
) -> Comparison:
    """Answers a mixed stream of held-out texts with every system.

    Args:
        store: holds the tenants.
        tenants: domain of each tenant that asks, by name.
        texts: held-out texts of each domain.
        settings: sizes of the stream.
        progress: told about loading and repetitions.
    """
    cut = {domain: cut_to_tokens(part, store.encoder, settings.max_tokens) for domain, part in texts.items()}
    stream = MixedStream(StreamSource(tenants, cut))
    rounds = [stream.batches(settings.batches) for _ in range(WARM_UP + settings.repetitions)]
    # What is left is earlier traffic; where little text is left, there was little of it.
    traffic = stream.batches(max(1, min(settings.warm_traffic_batches, stream.num_fresh_batches())))
    with (
        Engine(store, miss="backoff") as backoff,
        Engine(store, miss="exact") as exact,
        tempfile.TemporaryDirectory() as folder,
        warnings.catch_warnings(),
    ):
        # The exact engine is timed on tenants trained for back-off, on purpose: its speed is the question.
        warnings.simplefilter("ignore", MissPolicyWarning)
        served = export_tenants(store, list(tenants), Path(folder))
        peers = _prepare(_peers(store, backoff, exact), served, traffic, progress)
        answer_stream(peers[1], traffic, batch_size=len(tenants))
        before = [engine.stats().plot or {} for engine in (backoff, exact)]
        systems = _measure(peers, rounds, len(tenants), progress)
        after = [engine.stats().plot or {} for engine in (backoff, exact)]
        for peer in peers[2:]:
            peer.close()
    unigram = _unigram_rate(store, [request.text or "" for batch in rounds for request in batch])
    rates = tuple(
        _hit_rates(miss, unigram, old, new)
        for miss, old, new in zip(("backoff", "exact"), before, after, strict=True)
    )
    return Comparison(systems, rates, stream.num_repeated)


def _peers(store: Store, backoff: Engine, exact: Engine) -> list[Peer]:
    base, encoder = store.general_folder, store.encoder
    return [
        HmiPeer(
            backoff, name=HMI_BACKOFF, description="lowest half of the layers looked up; misses composed"
        ),
        HmiPeer(
            exact, name=HMI_EXACT, description="misses computed, and kept: the domains' earlier traffic too"
        ),
        OneModelPerTenant(base, encoder),
        PeftMixedBatch(base, encoder),
    ]


def _prepare(
    peers: list[Peer], served: Sequence[ServedTenant], traffic: Sequence[Request], progress: DemoProgress
) -> list[Peer]:
    for number, peer in enumerate(peers):
        progress("loading the tenants into every system", number, len(peers))
        peer.prepare(served)
        if isinstance(peer, PeftMixedBatch):
            tune(peer, traffic[: len(served)], candidates=(32, 16, 8))
    progress("loading the tenants into every system", len(peers), len(peers))
    return peers


def _measure(
    peers: Sequence[Peer], rounds: Sequence[Sequence[Request]], batch_size: int, progress: DemoProgress
) -> tuple[SystemResult, ...]:
    done = 0

    def on_repetition() -> None:
        nonlocal done
        done += 1
        progress("answering the mixed stream", done, len(rounds))

    def system(peer: Peer) -> Callable[[int], object]:
        return lambda number: answer_stream(peer, rounds[number], batch_size=batch_size)

    seconds = interleave(
        {peer.name: system(peer) for peer in peers},
        len(rounds) - WARM_UP,
        warm_up=WARM_UP,
        on_repetition=on_repetition,
    )
    return tuple(
        SystemResult(
            name=peer.name,
            description=peer.description,
            seconds=tuple(seconds[peer.name]),
            num_texts=len(rounds[0]),
        )
        for peer in peers
    )


def _unigram_rate(store: Store, texts: list[str]) -> float:
    plots = PlotLibrary(store.layout, store.catalog, store.general)
    root = store.catalog.chain(next(iter(store.domains)))[-1].name
    table = plots.reading([root]).table(root)
    num_rows = 0 if table is None or table.unigrams is None else len(table.unigrams)
    ids = torch.tensor([token for sequence in store.encoder.token_ids(texts) for token in sequence])
    plots.close()
    return float((ids < num_rows).double().mean())


def _hit_rates(miss: str, unigram: float, before: dict[str, int], after: dict[str, int]) -> HitRates:
    num_bigrams = after["windows"] - before["windows"]
    hits = after["window_hits"] - before["window_hits"]
    return HitRates(miss=miss, unigram=unigram, bigram=hits / max(1, num_bigrams), num_bigrams=num_bigrams)
