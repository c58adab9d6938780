"""Every kernel beside what torch would do instead: ``pytest -n0 benchmarks/kernels --benchmark-only``.

Groups hold a kernel and its peers; ``extra_info`` gives tokens or floating-point operations per call. Peers
are given their best case (their tables in one tensor, weights stacked, nothing to gather or to pad).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional

import hmi_kernels

VOCABULARY = 30_522
HIDDEN_SIZE = 384
NUM_SEQUENCES, LENGTH = 128, 64
NUM_TOKENS = NUM_SEQUENCES * LENGTH
NUM_ROWS = 150_000
NUM_BATCHES = 16  # different ones in turn, so that no call finds its rows in the cache


@pytest.fixture(autouse=True)
def _no_grad() -> None:
    torch.manual_seed(0)
    torch.set_grad_enabled(False)


def zipf_tokens(count: int) -> Tensor:
    """Tokens whose n-th most frequent one has a share of 1/n."""
    shares = 1 / torch.arange(1, VOCABULARY + 1, dtype=torch.float64)
    return torch.multinomial(shares, count, replacement=True).int()


@dataclass
class Plot:
    """A table of the most frequent bigrams of a text, and batches of other text."""

    index: Tensor
    rows: Tensor
    unigrams: Tensor
    offsets: Tensor
    batches: list[Tensor]

    def lookup(self, batch: int) -> Tensor:
        """The references of a batch; the batches come in turn."""
        chains = torch.zeros(NUM_SEQUENCES, 1, dtype=torch.int32)
        ids = self.batches[batch % NUM_BATCHES]
        return hmi_kernels.plot_lookup(ids, self.offsets, [self.index], chains, window=2)


@pytest.fixture(scope="module")
def plot() -> Plot:
    """Made once for all benchmarks."""
    text = zipf_tokens(2_000_000)
    keys, counts = hmi_kernels.count_ngrams(text, torch.tensor([0, len(text)]), order=2)
    keys = keys[counts.topk(NUM_ROWS).indices[torch.randperm(NUM_ROWS)]].contiguous()
    return Plot(
        hmi_kernels.plot_index_build(keys),
        torch.randn(NUM_ROWS, 2, HIDDEN_SIZE).half(),
        torch.randn(VOCABULARY, 3, HIDDEN_SIZE).half(),
        torch.arange(NUM_SEQUENCES + 1) * LENGTH,
        [zipf_tokens(NUM_TOKENS) for _ in range(NUM_BATCHES)],
    )


def in_turn(function: Callable[[int], object]) -> Callable[[], object]:
    """Calls the function with 0, 1, 2, ..."""
    numbers = iter(range(10**9))
    return lambda: function(next(numbers))


@pytest.mark.benchmark(group="plot_lookup: 8192 tokens, 150k bigrams")
@pytest.mark.parametrize("peer", ["hmi", "torch.searchsorted"])
def test_lookup(benchmark: BenchmarkFixture, plot: Plot, peer: str) -> None:
    """From tokens to rows."""
    benchmark.extra_info["tokens"] = NUM_TOKENS
    if peer == "hmi":
        benchmark(in_turn(plot.lookup))
        return
    used = plot.index[plot.index[:, 0] != 0]
    sorted_keys, order = used[:, 0].sort()
    rows = used[order, 1]

    def search(batch: int) -> Tensor:
        ids = plot.batches[batch % NUM_BATCHES].long() + 1
        keys = (ids << 42) | (ids.roll(-1) << 21)
        places = torch.searchsorted(sorted_keys, keys).clamp_(max=NUM_ROWS - 1)
        return torch.where(sorted_keys[places] == keys, rows[places], -1)

    benchmark(in_turn(search))


@pytest.mark.benchmark(group="plot_merge: 8192 tokens, hidden 384, float16 rows")
@pytest.mark.parametrize("peer", ["hmi", "torch"])
def test_merge(benchmark: BenchmarkFixture, plot: Plot, peer: str) -> None:
    """From rows to hidden states."""
    benchmark.extra_info["tokens"] = NUM_TOKENS
    references = [plot.lookup(batch) for batch in range(NUM_BATCHES)]
    unigram_table_of = torch.zeros(NUM_SEQUENCES, dtype=torch.int32)
    positions, weight, bias = torch.randn(512, HIDDEN_SIZE), torch.ones(HIDDEN_SIZE), torch.zeros(HIDDEN_SIZE)

    def merge(batch: int) -> Tensor:
        return hmi_kernels.plot_merge(
            plot.batches[batch % NUM_BATCHES],
            plot.offsets,
            references[batch % NUM_BATCHES],
            [plot.rows],
            [plot.unigrams],
            unigram_table_of,
            positions,
            weight,
            bias,
            layer_norm_eps=1e-5,
            window=2,
        )

    place = torch.arange(LENGTH).repeat(NUM_SEQUENCES)

    def merge_in_torch(batch: int) -> Tensor:
        """As if every bigram had a row: three gathers, two sums, one LayerNorm."""
        found = references[batch % NUM_BATCHES].squeeze(1).clamp(min=0)
        state = plot.rows[found, 0].float() + plot.rows[found.roll(1), 1].float()
        state -= plot.unigrams[plot.batches[batch % NUM_BATCHES].long(), 0].float()
        return functional.layer_norm(state + positions[place], (HIDDEN_SIZE,), weight, bias)

    benchmark(in_turn(merge if peer == "hmi" else merge_in_torch))


@pytest.mark.benchmark(group="count_ngrams: 1M tokens, bigrams")
@pytest.mark.parametrize("peer", ["hmi one batch", "hmi counter", "torch.unique"])
def test_count(benchmark: BenchmarkFixture, peer: str) -> None:
    """From text to counts."""
    text = zipf_tokens(1_000_000)
    offsets = torch.arange(0, len(text) + 1, 100)
    benchmark.extra_info["tokens"] = len(text)
    if peer == "hmi one batch":
        benchmark(lambda: hmi_kernels.count_ngrams(text, offsets, order=2))
    elif peer == "hmi counter":
        counter = hmi_kernels.NgramCounter(2)
        benchmark(lambda: counter.add(text, offsets))
    else:
        ids = text.long() + 1
        benchmark(lambda: torch.unique((ids << 42) | (ids.roll(-1) << 21), return_counts=True))


SHAPES = [(32, 64, 384, 16), (32, 64, 384, 64), (32, 20, 384, 16), (32, 1, 384, 16), (1, 2048, 384, 64)]


@pytest.mark.benchmark(group="adapters")
@pytest.mark.parametrize(
    "peer", ["hmi bottleneck", "hmi lora", "torch.bmm", "torch.matmul, one adapter for all"]
)
@pytest.mark.parametrize(("segments", "length", "hidden", "rank"), SHAPES)
def test_adapters(
    benchmark: BenchmarkFixture, segments: int, length: int, hidden: int, rank: int, peer: str
) -> None:
    """Many tenants' adapters in one call."""
    shape = f"{segments} segments of {length} tokens, hidden {hidden}, rank {rank}"
    benchmark.group = f"adapters: {shape}"
    num_tokens = segments * length
    benchmark.extra_info["flop"] = 4 * num_tokens * hidden * rank
    block = 2 * hidden * rank + rank + hidden
    arena = torch.randn(segments * block) / hidden**0.5
    x, output = torch.randn(num_tokens, hidden), torch.zeros(num_tokens, hidden)
    offsets, slots = torch.arange(segments + 1) * length, torch.arange(segments, dtype=torch.int32)
    of_slot = torch.arange(segments) * block, torch.full((segments,), rank, dtype=torch.int32)
    scales = torch.full((segments,), 0.5)
    activations = torch.ones(segments, dtype=torch.int32)
    down, up = torch.randn(segments, hidden, rank), torch.randn(segments, rank, hidden)
    calls: dict[str, Callable[[], object]] = {
        "hmi bottleneck": lambda: hmi_kernels.grouped_bottleneck(
            output, x, arena, offsets, slots, *of_slot, activations, scales
        ),
        "hmi lora": lambda: hmi_kernels.grouped_lora(output, x, arena, offsets, slots, *of_slot, scales),
        "torch.bmm": lambda: torch.bmm(torch.bmm(x.view(segments, length, hidden), down), up),
        "torch.matmul, one adapter for all": lambda: (x @ down[0]) @ up[0],
    }
    benchmark(calls[peer])


@pytest.mark.benchmark(group="packed_attention: 32 texts of 8 to 100 tokens, 12 heads of 32")
@pytest.mark.parametrize("peer", ["hmi", "torch, text by text", "torch, padded"])
def test_attention(benchmark: BenchmarkFixture, peer: str) -> None:
    """Self-attention over texts of different lengths."""
    lengths = torch.randint(8, 101, (32,)).tolist()
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    query, key, value = torch.randn(sum(lengths), 3 * HIDDEN_SIZE).split(HIDDEN_SIZE, dim=1)
    benchmark.extra_info["tokens"] = sum(lengths)

    def heads(part: Tensor) -> Tensor:
        return part.unflatten(-1, (12, 32)).transpose(-3, -2)

    def text_by_text() -> list[Tensor]:
        texts = zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True)
        return [functional.scaled_dot_product_attention(*map(heads, text)) for text in texts]

    padded = [heads(torch.randn(32, max(lengths), HIDDEN_SIZE)) for _ in range(3)]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])[:, None, None]
    calls: dict[str, Callable[[], object]] = {
        "hmi": lambda: hmi_kernels.packed_attention(query, key, value, offsets, offsets, num_heads=12),
        "torch, text by text": text_by_text,
        "torch, padded": lambda: functional.scaled_dot_product_attention(*padded, attn_mask=mask),
    }
    benchmark(calls[peer])
