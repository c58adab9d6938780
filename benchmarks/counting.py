"""How fast is a corpus of any size counted, and in how much memory?"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from benchmarks.arguments import Arguments, read_arguments, read_texts
from benchmarks.peers.ngram_counters import DuckDbCounts, count_with_counter, count_with_hmi, count_with_torch
from benchmarks.recorded_command import recorded_command
from benchmarks.result import BenchmarkResult, Case, Quantity, Ratio, System
from hmi_engine.construct.counting import count_corpus
from hmi_engine.construct.counting_tokens import corpus_tokenizer
from hmi_engine.demo.base_model import PACKAGE, packaged_model
from hmi_engine.demo.timing import interleave
from hmi_engine.errors import HmiError
from hmi_engine.knowledge.corpus import CorpusReport, stream_texts
from hmi_engine.knowledge.sizes import format_bytes
from hmi_engine.models.packing import PackedSequences
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["CountedCorpus", "count_in_process", "main"]

QUESTION = "How fast is a corpus of any size counted, and in how much memory?"
MAX_WORDS = 60
MAX_TOKENS = 512
SAMPLE_TEXTS, QUICK_SAMPLE_TEXTS = 40_000, 300
REPETITIONS, QUICK_REPETITIONS = 5, 2
MEMORY_LIMIT = 1 << 30
SMALL_MEMORY_LIMIT = 64 << 20
TEXTS_PER_CALL = 4096
NOTES = (
    "A whole corpus: from files to sorted keys and counts, so reading, tokenising, counting and, where the "
    "limit asks for it, adding up on disk; each in a process of its own, once. Peak memory is the kernel's "
    "high-water mark of that process' resident pages, Python, torch and the tokenizer included.",
    "The limit is what counts may take; beyond it they are spilled to DuckDB. No text is repeated.",
    "Tokenising: HMI tokenises what stands between two spaces once and remembers it, which for this kind of "
    "tokenizer gives the same ids; both were compared on the sample before timing. Every repetition begins "
    "with an empty memory; in a small sample more words are new than in a whole corpus.",
    "Counting: bigrams and trigrams of the sample's token ids, which lie in memory in the form that each "
    "system takes; all found as many n-grams, and the same sum of squared counts, before timing.",
)


_Ids: TypeAlias = npt.NDArray[np.int32]
_System: TypeAlias = tuple[Callable[[int], object], str]
"""What one repetition runs, and how it was set up."""


@dataclass(frozen=True)
class CountedCorpus:
    """What counting a corpus in a process of its own took."""

    seconds: float
    tokens: int
    texts: int
    bytes: int
    distinct: int
    occurrences: int
    has_spilled: bool
    peak_memory: int


@contextmanager
def _corpus_files(arguments: Arguments, corpus: Sequence[Path]) -> Iterator[tuple[list[Path], str]]:
    """The files to count, and what they are: those given, or one of the texts of installed packages."""
    if corpus:
        yield list(corpus), f"{len(corpus)} files and folders given by --corpus"
        return
    data = read_texts(arguments, max_words=MAX_WORDS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.txt"
        texts = dict.fromkeys(text for domain in data.domains for text in domain.texts)
        path.write_text("\n".join(" ".join(text.split()) for text in texts))
        yield [path], data.source


def count_in_process(paths: list[Path], window: int, memory_bytes: int) -> CountedCorpus:
    """Counts a corpus in a fresh process, whose memory is nobody else's."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_count, (paths, window, memory_bytes))


def _count(paths: list[Path], window: int, memory_bytes: int) -> CountedCorpus:
    encoder = TextEncoder(packaged_model(), MAX_TOKENS)
    report = CorpusReport()
    steps: set[str] = set()
    started = time.perf_counter()
    counts = count_corpus(
        stream_texts(paths, report=report),
        encoder,
        window=window,
        memory_bytes=memory_bytes,
        progress=lambda step, *_: steps.add(step),
    )
    return CountedCorpus(
        seconds=time.perf_counter() - started,
        tokens=counts.num_tokens,
        texts=counts.num_texts,
        bytes=report.bytes,
        distinct=counts.num_distinct,
        occurrences=counts.total_occurrences,
        has_spilled=any(step.startswith("adding up") for step in steps),
        peak_memory=_peak_memory(),
    )


def _peak_memory() -> int:
    """Of this process; getrusage's figure would begin with what the parent had when it started the child."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise HmiError("/proc/self/status tells no VmHWM; this benchmark runs on Linux")


def _whole_corpus(paths: list[Path], window: int, memory_bytes: int) -> tuple[Case, list[Quantity]]:
    counted = count_in_process(paths, window, memory_bytes)
    name = f"whole corpus, window {window}, limit {format_bytes(memory_bytes)}"
    place = "in memory, then on disk" if counted.has_spilled else "in memory"
    system = System.of("HMI", f"files to counts, {place}", [counted.seconds], [counted.tokens], "tokens")
    case = Case(
        name=name,
        settings={
            "tokens": counted.tokens,
            "texts": counted.texts,
            "corpus_bytes": counted.bytes,
            "distinct_windows": counted.distinct,
            "occurrences": counted.occurrences,
            "seconds": round(counted.seconds, 1),
        },
        systems=(system,),
    )
    return case, [Quantity(name=f"peak memory: {name}", value=counted.peak_memory / 2**20, unit="MiB")]


def _tokenizing(texts: list[str], encoder: TextEncoder, repetitions: int) -> Case:
    batches = [texts[start : start + TEXTS_PER_CALL] for start in range(0, len(texts), TEXTS_PER_CALL)]

    def ours(_: int) -> _Ids:
        tokenize = corpus_tokenizer(encoder)
        return np.concatenate([tokenize(batch)[0] for batch in batches])

    def plain(_: int) -> _Ids:
        found = chain.from_iterable(encoder.token_ids(batch, whole=True) for batch in batches)
        return np.fromiter(chain.from_iterable(found), np.int32)

    if not np.array_equal(ours(0), tokens := plain(0)):
        raise HmiError("tokenising word by word gives other ids than the tokenizer: they cannot be compared")
    systems: dict[str, _System] = {
        "HMI words": (ours, "each word once; new ones by the tokenizer"),
        "tokenizer": (plain, "the fast tokenizer on whole texts, its own threads"),
    }
    return _timed("texts to token ids", systems, len(tokens), len(texts), repetitions)


def _counting(sequences: list[list[int]], repetitions: int) -> Case:
    packed = PackedSequences.pack(sequences)
    duckdb = DuckDbCounts(packed)
    systems: dict[str, _System] = {
        "HMI counter": (
            lambda _: count_with_hmi(packed),
            "open addressing by shards, threads; sorted result",
        ),
        "torch": (lambda _: count_with_torch(packed), "keys by arithmetic, torch.unique"),
        "DuckDB": (lambda _: duckdb.run(), "lists unnested to structs, GROUP BY; threads"),
        "Counter": (lambda _: count_with_counter(sequences), "collections.Counter of tuples"),
    }
    found = {name: run(0) for name, (run, _) in systems.items()}
    if any(totals != found["HMI counter"] for totals in found.values()):
        raise HmiError(f"the systems counted differently: {found}")
    case = _timed("token ids to counts", systems, packed.num_tokens, len(sequences), repetitions)
    duckdb.close()
    return case


def _timed(
    name: str,
    systems: dict[str, _System],
    num_tokens: int,
    num_texts: int,
    repetitions: int,
) -> Case:
    """One case; the first system's rate over each of the others."""
    seconds = interleave({name: run for name, (run, _) in systems.items()}, repetitions)
    work = [num_tokens] * repetitions
    ours, *others = (
        System.of(name, description, seconds[name], work, "tokens")
        for name, (_, description) in systems.items()
    )
    return Case(
        name=name,
        settings={"tokens": num_tokens, "texts": num_texts},
        systems=(ours, *others),
        ratios=tuple(Ratio.of(ours, other) for other in others),
    )


def measure(arguments: Arguments, corpus: Sequence[Path]) -> BenchmarkResult:
    """Counts the corpus whole, and a sample of it beside the peers."""
    repetitions = QUICK_REPETITIONS if arguments.quick else REPETITIONS
    limits = [MEMORY_LIMIT] if arguments.quick else [MEMORY_LIMIT, SMALL_MEMORY_LIMIT]
    encoder = TextEncoder(packaged_model(), MAX_TOKENS)
    with _corpus_files(arguments, corpus) as (paths, source):
        size = QUICK_SAMPLE_TEXTS if arguments.quick else SAMPLE_TEXTS
        sample = list(islice(stream_texts(paths), size))
        whole = [_whole_corpus(paths, window, limit) for window in (2, 3) for limit in limits]
    return BenchmarkResult.of(
        arguments,
        "counting",
        QUESTION,
        settings={
            "tokenizer": PACKAGE,
            "max_tokens": MAX_TOKENS,
            "text": source,
            "sample_texts": len(sample),
        },
        notes=NOTES,
        cases=(
            *(case for case, _ in whole),
            _tokenizing(sample, encoder, repetitions),
            _counting(encoder.token_ids(sample), repetitions),
        ),
        quantities=tuple(quantity for _, quantities in whole for quantity in quantities),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--corpus", type=Path, nargs="+", default=[])
    options, others = parser.parse_known_args(argv)
    description = f"{QUESTION} --corpus PATH...: files or folders to count; default: installed documentation."
    command = recorded_command("counting", argv)
    arguments = replace(read_arguments("counting", description, others), command=command)
    result = measure(arguments, options.corpus)
    result.write(arguments.out)
    for case in result.cases:
        for system in case.systems:
            print(f"{case.name}: {system.name} {system.rate.value / 1e6:.2f} M tokens/s")
    for quantity in result.quantities:
        print(f"{quantity.name}: {quantity.value:.0f} {quantity.unit}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
