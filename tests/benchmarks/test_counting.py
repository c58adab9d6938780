"""The counting benchmark: its peers count alike, and it runs from files to a result."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hmi_engine.models.packing import PackedSequences

REASON = "the counting benchmark needs the extra: bench"
counting = pytest.importorskip("benchmarks.counting", reason=REASON)
peers = pytest.importorskip("benchmarks.peers.ngram_counters", reason=REASON)
read_results = pytest.importorskip("benchmarks.result", reason=REASON).read_results


def random_sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (50,), generator=generator).tolist()
    return [torch.randint(6, (length,), generator=generator).tolist() for length in lengths]


def test_all_peers_count_what_counter_counts() -> None:
    sequences = random_sequences()
    bigrams = Counter(pair for ids in sequences for pair in pairwise(ids))
    trigrams = Counter(tuple(ids[i : i + 3]) for ids in sequences for i in range(len(ids) - 2))
    expected = [(len(counts), sum(n * n for n in counts.values())) for counts in (bigrams, trigrams)]
    packed = PackedSequences.pack(sequences)
    assert peers.count_with_counter(sequences) == expected
    assert peers.count_with_hmi(packed) == expected
    assert peers.count_with_torch(packed) == expected
    duckdb = peers.DuckDbCounts(packed)
    assert duckdb.run() == duckdb.run() == expected
    duckdb.close()


@pytest.mark.slow
def test_a_process_of_its_own_tells_its_memory(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("the cell\nthe gene\n")
    counted = counting.count_in_process([path], 2, 1 << 30)
    assert (counted.texts, counted.tokens, counted.distinct, counted.occurrences) == (2, 8, 5, 6)
    assert counted.bytes == path.stat().st_size
    assert not counted.has_spilled
    assert 50 << 20 < counted.peak_memory < 4 << 30


def test_the_quick_benchmark_runs_on_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, out = tmp_path / "corpus.txt", tmp_path / "results" / "counting.json"
    corpus.write_text("\n".join(f"the cell binds gene {number % 7}" for number in range(40)))

    def here(paths: list[Path], window: int, memory_bytes: int) -> object:
        return counting._count(paths, window, memory_bytes)

    monkeypatch.setattr(counting, "count_in_process", here)
    counting.main(["--quick", "--corpus", str(corpus), "--out", str(out)])
    [result] = read_results(out.parent)
    assert result.command == "python -m benchmarks.counting --quick --corpus corpus.txt --out counting.json"
    assert [case.name for case in result.cases] == [
        "whole corpus, window 2, limit 1.0 GiB",
        "whole corpus, window 3, limit 1.0 GiB",
        "texts to token ids",
        "token ids to counts",
    ]
    assert {case.settings["tokens"] for case in result.cases} == {40 * 7}
    assert len(result.quantities) == 2
