"""PLOT retrieval to be measured: the most frequent n-grams of a Zipf text, and a batch of other text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import hmi_kernels
from benchmarks.gpu.costs import Cost, lookup_cost, merge_cost
from benchmarks.peers.torch_plot import PackedBatch
from hmi_kernels.row_tables import quantize_rows

__all__ = ["PlotProblem", "PlotShape"]

LAYER_NORM_EPS = 1e-5
ROW_MASK = (1 << hmi_kernels.ROW_BITS) - 1


@dataclass(frozen=True)
class PlotShape:
    """``num_rows`` n-grams in two tables that every sequence's chain has; all sequences are equally long."""

    window: int
    hidden_size: int
    row_type: torch.dtype
    num_sequences: int
    length: int
    num_rows: int
    vocabulary: int

    @property
    def num_tokens(self) -> int:
        """Of all sequences."""
        return self.num_sequences * self.length


class PlotProblem:
    """Inputs of look-up and merge on a device; hidden states are float16."""

    def __init__(self, shape: PlotShape, device: torch.device) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(0)
        shares = 1 / torch.arange(1, shape.vocabulary + 1, dtype=torch.float64)
        text = torch.multinomial(shares, 8 * shape.num_rows, replacement=True, generator=generator).int()
        ids = torch.multinomial(shares, shape.num_tokens, replacement=True, generator=generator).int()
        keys = _frequent_keys(text, shape)
        half = len(keys) // 2
        tables = keys[:half].contiguous(), keys[half:].contiguous()
        self.keys = keys.to(device)
        self.key_references = torch.cat(
            [torch.arange(len(part)) | table << hmi_kernels.ROW_BITS for table, part in enumerate(tables)]
        ).to(device)
        self.indexes = [hmi_kernels.plot_index_build(part).to(device) for part in tables]
        self.input_ids = ids.to(device)
        self.offsets = (torch.arange(shape.num_sequences + 1) * shape.length).to(device)
        self.chains = torch.tensor([[0, 1]] * shape.num_sequences, dtype=torch.int32, device=device)
        self.unigram_table_of = torch.zeros(shape.num_sequences, dtype=torch.int32, device=device)
        self.first_table_rows = half
        on_device = torch.Generator(device).manual_seed(0)

        def random(*size: int) -> Tensor:
            return torch.randn(size, generator=on_device, device=device, dtype=torch.float16)

        rows = random(len(keys), shape.window, shape.hidden_size)
        self.unigrams = random(shape.vocabulary, 3, shape.hidden_size)
        self.positions = random(max(shape.length, 8), shape.hidden_size)
        self.norm_weight, self.norm_bias = random(shape.hidden_size), random(shape.hidden_size)
        self.scales: list[Tensor] = []
        if shape.row_type is torch.int8:
            rows, scales = quantize_rows(rows)
            self.scales = [scales[:half].contiguous(), scales[half:].contiguous()]
        self.all_rows = rows
        self.rows = [rows[:half], rows[half:]]

    @cached_property
    def batch(self) -> PackedBatch:
        """What is known of the sequences."""
        positions = torch.arange(self.shape.length, device=self.input_ids.device)
        positions = positions.repeat(self.shape.num_sequences)
        return PackedBatch(self.input_ids, positions > 0, positions < self.shape.length - 1, positions)

    def lookup(self) -> Tensor:
        """The op, on whatever backend is chosen."""
        return hmi_kernels.plot_lookup(
            self.input_ids, self.offsets, self.indexes, self.chains, window=self.shape.window
        )

    @cached_property
    def references(self) -> Tensor:
        """By the reference."""
        with hmi_kernels.use_backend("reference"):
            return self.lookup()

    def merge(self, rows: list[Tensor], unigrams: Tensor, scales: list[Tensor]) -> Tensor:
        """The op on these rows (of the device, or pinned), on whatever backend is chosen."""
        return self._merge(rows, unigrams, scales, self.positions, self.norm_weight, self.norm_bias)

    def _merge(self, rows: list[Tensor], unigrams: Tensor, scales: list[Tensor], *norm: Tensor) -> Tensor:
        return hmi_kernels.plot_merge(
            self.input_ids,
            self.offsets,
            self.references,
            rows,
            [unigrams],
            self.unigram_table_of,
            *norm,
            layer_norm_eps=LAYER_NORM_EPS,
            window=self.shape.window,
            row_scales=scales,
        )

    def expected_states(self) -> Tensor:
        """float32 [T, H] by the reference."""
        norm = self.positions.float(), self.norm_weight.float(), self.norm_bias.float()
        with hmi_kernels.use_backend("reference"):
            return self._merge(self.rows, self.unigrams, self.scales, *norm)

    @property
    def places(self) -> Tensor:
        """The references as places in ``all_rows``, -1 for none."""
        found = self.references
        place = (found >> hmi_kernels.ROW_BITS) * self.first_table_rows + (found & ROW_MASK)
        return torch.where(found >= 0, place, -1)

    @cached_property
    def lookup_cost(self) -> Cost:
        """Each n-gram that occurs reads a slot of at least one index."""
        ids = self.batch.input_ids.long()
        pairs = torch.stack([ids, ids.roll(-1)], dim=1)[self.batch.has_right]
        distinct = len(pairs.unique(dim=0))
        if self.shape.window == 3:
            triples = torch.stack([ids.roll(1), ids, ids.roll(-1)], dim=1)
            distinct = len(triples[self.batch.has_left & self.batch.has_right].unique(dim=0))
        return lookup_cost(
            num_tokens=self.shape.num_tokens,
            num_sequences=self.shape.num_sequences,
            distinct_keys=distinct,
            window=self.shape.window,
        )

    @cached_property
    def merge_cost(self) -> Cost:
        """Of the slots and unigrams that this batch needs."""
        shape, columns = self.shape, self.references.unbind(1)
        return merge_cost(
            num_tokens=shape.num_tokens,
            num_sequences=shape.num_sequences,
            row_slots=self._num_row_slots(columns),
            unigram_rows=sum(len(self.input_ids[needed].unique()) for needed in self._unigrams(columns)),
            position_rows=shape.length,
            hidden_size=shape.hidden_size,
            window=shape.window,
            row_bytes=shape.row_type.itemsize,
            element_bytes=2,
        )

    def _unigrams(self, columns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """For each of the three unigram rows of a token, which tokens need it: bool [T]."""
        has_left, has_right = self.batch.has_left, self.batch.has_right
        if self.shape.window == 2:
            is_found = columns[0] >= 0
            return has_left == has_right, has_left & ~is_found.roll(1), has_right & ~is_found
        whole, before, after = (column >= 0 for column in columns)
        first = has_right & ~(whole | before).roll(-1)
        last = has_left & ~(whole | after).roll(1)
        return first, (whole | before) == after, last

    def _num_row_slots(self, columns: tuple[Tensor, ...]) -> int:
        def distinct(references: Tensor, mask: Tensor | None = None) -> int:
            chosen = references if mask is None else references[mask]
            return len(chosen[chosen >= 0].unique())

        if self.shape.window == 2:
            return 2 * distinct(columns[0])
        whole, before, after = columns
        slots = distinct(whole) + 2 * distinct(before) + 2 * distinct(after)
        return slots + distinct(whole, self.batch.has_left) + distinct(whole, self.batch.has_right)


def _frequent_keys(text: Tensor, shape: PlotShape) -> Tensor:
    """The keys of the most frequent windows, in random order; of 3 tokens, half of them are bigrams."""
    bounds = torch.tensor([0, len(text)])
    keys, counts = hmi_kernels.count_ngrams(text, bounds, order=shape.window)
    keys = keys[counts.topk(min(shape.num_rows, len(keys))).indices]
    if shape.window == 3:
        pairs, counts = hmi_kernels.count_ngrams(text, bounds, order=2)
        before = pairs[counts.topk(min(shape.num_rows // 4, len(pairs))).indices]
        tokens = hmi_kernels.ngram_tokens(before)
        after = torch.stack([torch.full_like(tokens[:, 0], -1), tokens[:, 0], tokens[:, 1]], dim=1)
        keys = torch.cat([keys[: shape.num_rows // 2], before, hmi_kernels.ngram_keys(after.contiguous())])
    generator = torch.Generator().manual_seed(1)
    return keys[torch.randperm(len(keys), generator=generator)].contiguous()
