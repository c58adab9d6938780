"""A table's rows in every format: what is lost of them, what a merge makes of them, how alike they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hmi_kernels
from benchmarks.composition_tasks import general_info
from hmi_engine.construct.materialise import compute_unigrams
from hmi_engine.construct.row_encoding import EncodedRows, RowEncoder
from hmi_engine.knowledge.row_formats import RowFormat
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import PackedSequences

__all__ = ["StoredTable", "Table", "compute_table", "nearest_distances", "relative_error", "store_table"]

WINDOW = 2
WINDOWS_PER_BATCH = 4096
ROWS_PER_BLOCK = 512


@dataclass(frozen=True)
class Table:
    """The bigrams of a corpus with their exact rows.

    Attributes:
        model: the base that computed them.
        keys: int64 [N], ascending.
        counts: int64 [N], how often the corpus holds them.
        rows: float32 [N, 2, H].
        unigrams: float16 [V, 3, H], as a store keeps them.
    """

    model: HierarchicalBert
    keys: Tensor
    counts: Tensor
    rows: Tensor
    unigrams: Tensor

    def references(self, keys: Tensor, held: Tensor) -> Tensor:
        """int64 [T, 1]: the row of each token's bigram where ``held`` bool [T] says so, -1 elsewhere.

        Every bigram that is held must be in the table.
        """
        places = torch.searchsorted(self.keys, keys).clamp_(max=len(self.keys) - 1)
        found = self.keys[places] == keys
        if bool((held & ~found).any()):
            raise ValueError("a bigram that shall be held is not in the table")
        return torch.where(held, places, -1)[:, None]

    def most_frequent(self, num_rows: int) -> Tensor:
        """Bool [N]: the rows that a table of so many keeps, by count and then by key."""
        kept = torch.zeros(len(self.keys), dtype=torch.bool)
        kept[self.counts.argsort(descending=True, stable=True)[:num_rows]] = True
        return kept

    def unigram_rows(self) -> Tensor:
        """float32 [N, 2, H]: for each slot of each row, its token's unigram row."""
        return self.unigrams[hmi_kernels.ngram_tokens(self.keys)[:, :WINDOW].long(), 0].float()


@torch.no_grad()
def compute_table(
    model: HierarchicalBert, corpus: PackedSequences, placeholder_token_id: int | None, min_count: int = 2
) -> Table:
    """Runs the bigrams that the corpus holds so often, and every token alone, through the domain layers."""
    keys, counts = hmi_kernels.count_ngrams(corpus.input_ids, corpus.offsets, order=WINDOW)
    keys, order = keys[counts >= min_count].sort()
    tokens = hmi_kernels.ngram_tokens(keys)[:, :WINDOW]
    rows = torch.cat([model.window_states(part) for part in tokens.split(WINDOWS_PER_BATCH)])
    stored = {"placeholder_token_id": placeholder_token_id, "row_dtype": "float16"}
    unigrams = compute_unigrams(model.window_states, general_info(model, "").model_copy(update=stored))
    return Table(model, keys, counts[counts >= min_count][order], rows, unigrams)


@dataclass(frozen=True)
class StoredTable:
    """A table as a store keeps it in one format."""

    table: Table
    encoder: RowEncoder
    encoded: EncodedRows

    @property
    def num_bytes(self) -> int:
        """Bytes of rows, scales and codebooks."""
        tensors = (*self.encoded, self.encoder.codebooks)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def merge(self, sequences: PackedSequences, references: Tensor) -> Tensor:
        """The input of the first upper layer, float32 [T, H], by the kernel that serves."""
        model = self.table.model
        scales, codebooks = self.encoded.row_scales, self.encoder.codebooks
        return hmi_kernels.plot_merge(
            sequences.input_ids,
            sequences.offsets,
            references,
            [self.encoded.rows],
            [self.table.unigrams],
            torch.zeros(sequences.num_sequences, dtype=torch.int32),
            model.merge_positions,
            model.merge_norm.weight,
            model.merge_norm.bias,
            layer_norm_eps=model.merge_norm.eps,
            window=WINDOW,
            row_scales=[] if scales is None else [scales],
            codebooks=[] if codebooks is None else [codebooks],
        )

    def row_error(self) -> float:
        """Length of what is lost of the rows over the length of the rows."""
        return relative_error(self.encoder.decode(self.encoded), self.table.rows)


def store_table(table: Table, row_format: RowFormat) -> StoredTable:
    """Trains codebooks, if the format has some, on the table's own rows, and encodes them."""
    encoder = RowEncoder.fit(table.rows, row_format)
    return StoredTable(table, encoder, encoder.encode(table.rows))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Length of the difference over the length of what is expected, over all elements."""
    return float((found - expected).norm() / expected.norm())


def nearest_distances(rows: Tensor, sample: Sequence[int]) -> Tensor:
    """How far each of some rows is from the nearest other one, over its own length.

    Args:
        rows: float32 [N, ...], N at least 2.
        sample: which rows.

    Returns: float32 [len(sample)].
    """
    flat = rows.flatten(1)
    squares = flat.pow(2).sum(1)
    nearest = []
    for block in torch.tensor(sample).split(ROWS_PER_BLOCK):
        distances = squares[block, None] + squares - 2 * flat[block] @ flat.T
        distances[torch.arange(len(block)), block] = torch.inf
        others = distances.argmin(dim=1)  # measured again below: the sum above cancels
        nearest.append((flat[block] - flat[others]).norm(dim=1) / squares[block].sqrt())
    return torch.cat(nearest)
