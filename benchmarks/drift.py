"""How often does a table hit while its traffic turns from one domain's text into another's?"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import hmi_kernels
from benchmarks.arguments import RESULTS, Arguments
from benchmarks.drift_policies import (
    Clairvoyant,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    Period,
    Policy,
    Static,
    Updated,
    most_frequent_rows,
    record,
)
from benchmarks.growth_texts import TokenizedTexts, documentation_groups, folder_groups
from benchmarks.recorded_command import recorded_command
from benchmarks.result import BenchmarkResult, Curve, Quantity
from hmi_engine.demo.base_model import PACKAGE, packaged_model
from hmi_engine.errors import HmiError
from hmi_engine.knowledge.frequencies import Frequencies
from hmi_engine.memory.traffic import TrafficRecorder
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["Drift", "main", "make_drift", "measure"]

NAME = "drift"
QUESTION = "How often does a table hit while its traffic turns from one domain's text into another's?"
MAX_TOKENS = 512
MAX_WORDS = 256
CORPUS_SHARE = 0.5
STATIC, RECENT, FREQUENT, KNOWN = "static", "LRU", "LFU", "best for each period, known before"
NOTES = (
    "Bigram windows. The table is built from text of domain A; the traffic is other text of A, whose texts "
    "give way to B's: the chance that the next text is B's rises from 0 to 1 over the stream. All policies "
    "begin with the same rows and hold equally many.",
    "Two orders: random, as of many users' requests, and that of the files, where texts of one document "
    "follow each other and a cache of recent rows profits.",
    "LRU and LFU compute the row of every miss at once and keep it: exact mode. HMI computes rows only at "
    "updates, which come after each period, a bounded number each: its traffic is counted by a sketch, and "
    "counts decay with the half-life that is named. LFU begins with the corpus' counts, which serve it "
    "better than none.",
    "A row of two tokens costs two tokens' way through the domain layers, about; the plain model one per "
    "token. So a policy that computes more than about 500 rows per 1,000 tokens is slower than no table.",
    "The best for each period is the table of the same size that hits most in that period, chosen with "
    "knowledge of it. Nothing that changes between periods only hits more; LRU and LFU change within them.",
)


@dataclass(frozen=True, eq=False)
class Drift:
    """The experiment's text and sizes.

    Attributes:
        corpus: text of domain A that the first table is built from.
        streams: the traffic by the order of its texts, cut into periods after which the table is updated.
        rows: that each policy holds.
        half_lives: of counts, in tokens; the middle one is also tried with unbounded updates.
        max_promotions: rows that one update computes at most.
    """

    corpus: TokenizedTexts
    streams: Mapping[str, tuple[Period, ...]]
    rows: int
    half_lives: tuple[int, ...]
    max_promotions: int


def make_drift(
    first: TokenizedTexts, second: TokenizedTexts, *, num_tokens: int, num_periods: int, rows: int
) -> Drift:
    """Half of ``first`` is the corpus; the rest, and ``second``, are mixed into at most ``num_tokens``."""
    corpus = first.between(0, int(first.num_tokens * CORPUS_SHARE))
    rest = first.between(int(first.num_tokens * CORPUS_SHARE), first.num_tokens)
    # Each domain gives half of the stream.
    num_tokens = min(num_tokens, 2 * rest.num_tokens, 2 * second.num_tokens)
    streams = {
        name: _cut(_mix([order(rest), order(second)], num_tokens), num_periods)
        for name, order in (("random_order", _shuffled), ("file_order", _texts))
    }
    half_lives = tuple(num_tokens // num_periods * factor for factor in (1, 4, 16))
    return Drift(corpus, streams, rows, half_lives, max(1, rows // 32))


def _texts(texts: TokenizedTexts) -> list[torch.Tensor]:
    return [ids for ids in texts.input_ids.split(texts.offsets.diff().tolist()) if len(ids)]


def _shuffled(texts: TokenizedTexts) -> list[torch.Tensor]:
    parts = _texts(texts)
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(0))
    return [parts[index] for index in order.tolist()]


def _mix(sources: Sequence[list[torch.Tensor]], num_tokens: int) -> TokenizedTexts:
    """Draws from the first source, ever more often from the second, until there are so many tokens."""
    generator = torch.Generator().manual_seed(1)
    remaining = [iter(source) for source in sources]
    chosen: list[torch.Tensor] = []
    drawn = 0
    while drawn < num_tokens:
        source = int(torch.rand(1, generator=generator).item() < drawn / num_tokens)
        text = next(remaining[source], None)
        if text is None:
            break
        chosen.append(text)
        drawn += len(text)
    lengths = torch.tensor([0, *map(len, chosen)], dtype=torch.int64)
    return TokenizedTexts(torch.cat(chosen), lengths.cumsum(0))


def _cut(stream: TokenizedTexts, num_periods: int) -> tuple[Period, ...]:
    step = stream.num_tokens // num_periods
    return tuple(Period.of(stream.between(i * step, (i + 1) * step)) for i in range(num_periods))


def policies(drift: Drift) -> dict[str, Policy]:
    """Each policy, with the table of domain A."""
    keys, counts = hmi_kernels.count_ngrams(drift.corpus.input_ids, drift.corpus.offsets, order=2)
    frequencies = Frequencies.none().with_corpus(keys, counts, occurrences=int(counts.sum()))
    table = most_frequent_rows(frequencies, drift.rows)
    if len(table) < drift.rows:
        raise HmiError(f"the corpus has {len(table)} bigrams, too few for {drift.rows} rows: give more text")
    made: dict[str, Policy] = {
        STATIC: Static(table),
        RECENT: LeastRecentlyUsed(table.flip(0)),
        FREQUENT: LeastFrequentlyUsed(table, frequencies.counts_of(table)),
    }
    bounds = [(half_life, drift.max_promotions) for half_life in drift.half_lives]
    for half_life, bound in (*bounds, (drift.half_lives[1], None)):
        name = f"HMI, half-life {half_life:,} tokens" + ("" if bound else ", unbounded")
        made[name] = Updated(frequencies, rows=drift.rows, half_life_tokens=half_life, max_promotions=bound)
    return made | {KNOWN: Clairvoyant(table)}


def serve(
    order: str, periods: Sequence[Period], made: Mapping[str, Policy]
) -> tuple[list[Curve], list[Quantity]]:
    """Runs every policy over a stream: its hit rate over time, the mean, and what it computed."""
    ends = torch.tensor([period.texts.num_tokens for period in periods]).cumsum(0).tolist()
    windows = [len(period.keys) for period in periods]
    label = order.replace("_", " ")
    curves, means, costs = [], [], []
    for name, policy in made.items():
        hits = [policy.serve(period) for period in periods]
        curves.append(
            Curve(
                figure=order,
                name=name,
                x_label=f"tokens of traffic, {label}",
                y_label="share of windows found",
                x=tuple(map(float, ends)),
                y=tuple(found / total for found, total in zip(hits, windows, strict=True)),
                x_scale="linear",
            )
        )
        share, cost = sum(hits) / sum(windows), 1000 * policy.rows_computed / ends[-1]
        means.append(Quantity(name=f"{label}, {name}: windows found", value=share, unit="share"))
        costs.append(Quantity(name=f"{label}, {name}: computed", value=cost, unit="rows per 1,000 tokens"))
    return curves, [*means, *costs]


def recording_cost(periods: Sequence[Period]) -> Quantity:
    """Nanoseconds per token that recording the stream takes, nothing left out for want of time."""
    recorder = TrafficRecorder(2, max_share=1e9)
    started = time.perf_counter()
    for period in periods:
        record(recorder, period.texts)
    seconds = time.perf_counter() - started
    tokens = sum(period.texts.num_tokens for period in periods)
    return Quantity(name="recording of traffic", value=1e9 * seconds / tokens, unit="ns per token")


def measure(drift: Drift, names: Sequence[str], arguments: Arguments) -> BenchmarkResult:
    """Runs all policies on each stream."""
    curves: list[Curve] = []
    quantities: list[Quantity] = []
    for order, periods in drift.streams.items():
        drawn, found = serve(order, periods, policies(drift))
        curves += drawn
        quantities += found
    periods = next(iter(drift.streams.values()))
    return BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings={
            "vocabulary": PACKAGE,
            "domains": list(names),
            "corpus_tokens": drift.corpus.num_tokens,
            "traffic_tokens": sum(period.texts.num_tokens for period in periods),
            "updates": len(periods),
            "rows": drift.rows,
            "promotions_per_update": drift.max_promotions,
        },
        notes=NOTES,
        quantities=(*quantities, recording_cost(periods)),
        curves=curves,
    )


def read_drift(argv: Sequence[str] | None) -> tuple[Drift, list[str], Arguments]:
    """Reads the command line and the texts that it names.

    Raises HmiError where there are not two domains, or too little text.
    """
    argv = sys.argv[1:] if argv is None else argv
    options = _parser().parse_args(argv)
    command = recorded_command(NAME, argv)
    arguments = Arguments(options.data, options.out, options.quick, command)
    encoder = TextEncoder(packaged_model(), MAX_TOKENS)
    if options.corpus:
        max_texts = 4000 if options.quick else None
        groups = folder_groups(options.corpus, encoder, cache=options.cache, max_texts=max_texts)
    else:
        groups = documentation_groups(arguments, encoder, max_words=MAX_WORDS)[:2]
    if len(groups) < 2:
        raise HmiError("the text has fewer than two domains: there is nothing to drift to")
    sizes = {"num_tokens": 40_000, "num_periods": 8, "rows": 1000} if options.quick else _full_sizes(options)
    drift = make_drift(groups[0].corpus, groups[1].corpus, **sizes)
    return drift, [group.name for group in groups], arguments


def _full_sizes(options: argparse.Namespace) -> dict[str, int]:
    return {"num_tokens": options.tokens, "num_periods": options.updates, "rows": options.rows}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=QUESTION)
    parser.add_argument(
        "--corpus",
        type=Path,
        nargs=2,
        metavar=("A", "B"),
        help="folders of text files, one text a line, and held_out.txt, which is not read here; default: two "
        "topics of the installed documentation",
    )
    parser.add_argument("--data", type=Path, help='instead: a folder of JSON lines {"text", "label"}')
    parser.add_argument("--cache", type=Path, help="folder that keeps token ids for the next run")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="of traffic, at most")
    parser.add_argument("--updates", type=int, default=40, help="periods that the traffic is cut into")
    parser.add_argument("--rows", type=int, default=32_768, help="of each policy's table")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="small sizes: proves that it runs, nothing else")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    drift, names, arguments = read_drift(argv)
    result = measure(drift, names, arguments)
    result.write(arguments.out)
    for quantity in result.quantities:
        print(quantity)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
