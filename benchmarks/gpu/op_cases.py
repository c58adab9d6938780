"""Every op once or twice, on small inputs with what is hazardous in them, in buffers that can be refilled.

Ragged and empty segments, segments without an adapter, tiles that are not full, a hidden size that is no
multiple of a tile, several ranks and tables, int8 rows, codes, rows of a wider tensor. What the checks of
graphs, of torch.compile and of the sanitizers run.
"""

from __future__ import annotations

import torch
from torch import Tensor

import hmi_kernels
from benchmarks.gpu.decoding_cases import decoding_cases
from benchmarks.gpu.op_case import OpCase, int32, random_tensor
from hmi_kernels.row_tables import quantize_rows

__all__ = ["OpCase", "op_cases"]

HIDDEN_SIZE = 264
RANKS = (16, 8, 24, 0)
PREFILL = (40, 0, 1, 17, 3)
DECODE = (1, 1, 0, 2, 1)
SLOTS = (2, 1, 0, -1, 3)
VOCABULARY = 7
NUM_ROWS = 30


def op_cases(device: torch.device, dtypes: tuple[torch.dtype, ...]) -> list[OpCase]:
    """All cases, those of adapters and vectors for each dtype."""
    cases = []
    for dtype in dtypes:
        suffix = str(dtype).removeprefix("torch.")
        for lengths, what in ((PREFILL, "prefill"), (DECODE, "decode")):
            cases.append(_bottleneck(f"grouped_bottleneck, {what}, {suffix}", lengths, device, dtype))
            cases.append(_lora(f"grouped_lora, {what}, {suffix}", lengths, (HIDDEN_SIZE,), device, dtype))
        cases.append(_lora(f"grouped_lora, three outputs, {suffix}", PREFILL, (256, 64, 8), device, dtype))
        cases += [_vectors(f"{name}, {suffix}", name, device, dtype) for name in ("scale", "bias")]
    for window in (2, 3):
        cases.append(_lookup(window, device))
        cases += [_merge(window, row_type, device) for row_type in (torch.float16, torch.int8, torch.uint8)]
    return [*cases, *decoding_cases(device, dtypes)]


class _Segments:
    """Tokens of segments whose lengths move from one to the next when refilled."""

    def __init__(
        self, lengths: tuple[int, ...], columns: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.lengths = lengths
        self.offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
        self.slots = torch.tensor(SLOTS, dtype=torch.int32, device=device)
        self.x = random_tensor((sum(lengths), HIDDEN_SIZE), device, dtype)
        self.start = random_tensor((sum(lengths), columns), device, dtype, seed=1)
        self._wide = torch.empty(sum(lengths), columns + 64, device=device, dtype=dtype)
        self.output = self._wide[:, 32 : 32 + columns]

    def refill(self, seed: int) -> None:
        turned = [self.lengths[(place + seed) % len(self.lengths)] for place in range(len(self.lengths))]
        self.offsets.copy_(torch.tensor([0, *turned]).cumsum(0))
        for tensor, number in ((self.x, 2 * seed), (self.start, 2 * seed + 1)):
            tensor.copy_(random_tensor(tuple(tensor.shape), tensor.device, tensor.dtype, number))


def _arena(sizes: list[int], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Blocks of these sizes, values of a size that keeps sums near one, and where they begin."""
    padded = [-(-size // 8) * 8 + 8 for size in sizes]
    starts = torch.tensor([0, *padded]).cumsum(0)
    return random_tensor((int(starts[-1]),), device, dtype, seed=2) / HIDDEN_SIZE**0.5, starts[:-1].to(device)


def _bottleneck(name: str, lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> OpCase:
    segments = _Segments(lengths, HIDDEN_SIZE, device, dtype)
    arena, starts = _arena([(2 * HIDDEN_SIZE + 1) * rank + HIDDEN_SIZE for rank in RANKS], device, dtype)
    ranks, activations = int32([*RANKS], device), int32([0, 1, 2, 3], device)
    scales = torch.tensor([1.0, -0.5, 2.0, 1.0], device=device)
    weight, bias = random_tensor((2, HIDDEN_SIZE), device, dtype, seed=3)

    def run() -> Tensor:
        segments.output.copy_(segments.start)
        hmi_kernels.grouped_bottleneck(
            segments.output,
            segments.x,
            arena,
            segments.offsets,
            segments.slots,
            starts,
            ranks,
            activations,
            scales,
            layer_norm_weight=weight,
            layer_norm_bias=bias,
            max_rank=max(RANKS),
        )
        return segments.output

    return OpCase(name, run, segments.refill)


def _lora(
    name: str, lengths: tuple[int, ...], sizes: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> OpCase:
    segments = _Segments(lengths, sum(sizes), device, dtype)
    blocks = [(HIDDEN_SIZE + size) * rank for size in sizes for rank in RANKS]
    arena, starts = _arena(blocks, device, dtype)
    tables = starts.view(len(sizes), -1), int32([*RANKS] * len(sizes), device).view(len(sizes), -1)
    scales = torch.linspace(-1, 2, len(blocks), device=device).view(len(sizes), -1)

    def run() -> Tensor:
        segments.output.copy_(segments.start)
        arguments = segments.output, segments.x, arena, segments.offsets, segments.slots, *tables, scales
        hmi_kernels.grouped_lora(*arguments, output_sizes=sizes, max_rank=max(RANKS))
        return segments.output

    return OpCase(name, run, segments.refill)


def _vectors(name: str, operation: str, device: torch.device, dtype: torch.dtype) -> OpCase:
    segments = _Segments(PREFILL, HIDDEN_SIZE, device, dtype)
    arena, starts = _arena([HIDDEN_SIZE] * 4, device, dtype)
    starts[1] = -1
    function = hmi_kernels.grouped_scale if operation == "scale" else hmi_kernels.grouped_bias

    def run() -> Tensor:
        segments.output.copy_(segments.start)
        function(segments.output, arena, segments.offsets, segments.slots, starts)
        return segments.output

    return OpCase(f"grouped_{name}", run, segments.refill)


class _Sequences:
    """Ids of sequences, some empty, over two tables of n-grams that hold about half of those that occur."""

    def __init__(self, window: int, device: torch.device) -> None:
        lengths = torch.tensor([0, 5, 1, 0, 2, 40])
        self.offsets = lengths.cumsum(0).to(device)
        self.ids = torch.zeros(int(lengths.sum()), dtype=torch.int32, device=device)
        num_sequences = len(lengths) - 1
        self.chains = int32([0, 1, 1, 0, 0, -1, 1, -1, 0, 1], device).view(num_sequences, 2)
        self.unigram_table_of = int32([0, 1, 0, 1, 0], device)
        places = [torch.arange(VOCABULARY)] * 2 if window == 2 else [torch.arange(-1, VOCABULARY)] * 3
        every = torch.cartesian_prod(*places).to(torch.int32)
        every = every if window == 2 else every[every[:, 1] >= 0]
        if window == 2:
            every = torch.cat([every, torch.full((len(every), 1), -1, dtype=torch.int32)], dim=1)
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
        keys = hmi_kernels.ngram_keys(every[order].contiguous())
        parts = keys[:NUM_ROWS].contiguous(), keys[NUM_ROWS // 2 : NUM_ROWS // 2 + NUM_ROWS].contiguous()
        self.indexes = [hmi_kernels.plot_index_build(part).to(device) for part in parts]
        self.window = window
        self.num_rows = [len(part) for part in parts]
        self.refill(0)

    def refill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids.copy_(torch.randint(0, VOCABULARY, self.ids.shape, generator=generator))

    def lookup(self) -> Tensor:
        return hmi_kernels.plot_lookup(self.ids, self.offsets, self.indexes, self.chains, window=self.window)


def _lookup(window: int, device: torch.device) -> OpCase:
    sequences = _Sequences(window, device)
    return OpCase(f"plot_lookup, window {window}", sequences.lookup, sequences.refill)


def _merge(window: int, row_type: torch.dtype, device: torch.device) -> OpCase:
    sequences = _Sequences(window, device)
    references = sequences.lookup().clone()
    rows = [
        random_tensor((count, window, HIDDEN_SIZE), device, torch.float16, seed=count + table)
        for table, count in enumerate(sequences.num_rows)
    ]
    scales: list[Tensor] = []
    codebooks: list[Tensor] = []
    if row_type is torch.int8:
        quantized = [quantize_rows(part) for part in rows]
        rows, scales = [part for part, _ in quantized], [part for _, part in quantized]
    if row_type is torch.uint8:  # codes: any byte is one
        rows = [(part[:, :, : HIDDEN_SIZE // 4] * 1000).long().to(torch.uint8) for part in rows]
        pieces = (window, HIDDEN_SIZE // 4, 256, 4)
        codebooks = [
            random_tensor(pieces, device, torch.float16, seed=6 + table) for table in range(len(rows))
        ]
    unigrams = [
        random_tensor((VOCABULARY, 3, HIDDEN_SIZE), device, torch.float16, seed=seed) for seed in (3, 4)
    ]
    norm = random_tensor((42, HIDDEN_SIZE), device, torch.float16, seed=5)

    def run() -> Tensor:
        return hmi_kernels.plot_merge(
            sequences.ids,
            sequences.offsets,
            references,
            rows,
            unigrams,
            sequences.unigram_table_of,
            norm[:40],
            norm[40],
            norm[41],
            layer_norm_eps=1e-5,
            window=window,
            row_scales=scales,
            codebooks=codebooks,
        )

    def refill(seed: int) -> None:
        sequences.refill(seed)
        references.copy_(sequences.lookup())

    name = f"plot_merge, window {window}, {str(row_type).removeprefix('torch.')} rows"
    return OpCase(name, run, refill)
