"""Which n-grams of a domain get a row, decided from its frequencies before anything is computed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import JsonValue
from torch import Tensor

import hmi_kernels
from hmi_engine.errors import BudgetTooSmallError
from hmi_engine.knowledge.frequencies import Frequencies
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.plot_table import PlotMetadata
from hmi_engine.knowledge.row_formats import RowFormat, codebook_bytes
from hmi_engine.knowledge.selection import bytes_per_row, select_rows, table_bytes
from hmi_engine.knowledge.sizes import format_bytes

__all__ = ["TablePlan", "TableSettings", "largest_useful_count", "plan_table"]

_CANDIDATE_SHARE = 1 / 16
"""Of the budget: for n-grams that have no row, so that an update knows whether they have earned one."""
_CANDIDATE_BYTES = 16
_DIGEST_BYTES = 8
_HEADER_BYTES = 2048  # with the gaps between tensors


@dataclass(frozen=True)
class TableSettings:
    """What a person asked of a domain's table.

    Attributes:
        plot_bytes: budget of the file: rows, keys, counts, index, candidates and the texts' digests (of
            which at most a quarter of it is charged); 0 for no rows at all. Unigrams come on top.
        row_format: how its rows are stored.
        min_count: n-grams seen less often get no row.
    """

    plot_bytes: int
    row_format: RowFormat
    min_count: int


@dataclass(frozen=True, eq=False)
class TablePlan:
    """What a table will hold.

    Attributes:
        keys: int64 [N], ascending: the n-grams that get a row.
        counts: int64 [N], their counts.
        candidate_keys: int64 [M], ascending: counted n-grams that get none.
        candidate_counts: int64 [M], their counts.
        documents: int64 [D], sorted digests of the corpus' texts.
        metadata: of the table.
        statistics: ``hit_mass`` and ``inherited_mass``, shares of all counted occurrences.
    """

    keys: Tensor
    counts: Tensor
    candidate_keys: Tensor
    candidate_counts: Tensor
    documents: Tensor
    metadata: PlotMetadata
    statistics: dict[str, JsonValue]

    def fingerprint(self) -> str:
        """Return a digest of everything that the table's contents follow from."""
        digest = hashlib.sha256(self.metadata.model_dump_json().encode())
        for tensor in (self.keys, self.counts, self.candidate_keys, self.candidate_counts, self.documents):
            digest.update(tensor.numpy().data)
        return f"plan {digest.hexdigest()}"


def plan_table(
    frequencies: Frequencies,
    settings: TableSettings,
    general: GeneralInfo,
    *,
    layer_identity: str,
    corpus_tokens: int,
    documents: Tensor,
    inherited: Sequence[Tensor] = (),
    held: Tensor | None = None,
    max_promotions: int | None = None,
) -> TablePlan:
    """Decides what a domain's table holds.

    Args:
        frequencies: of the domain's n-grams.
        settings: budget, format, threshold.
        general: the store's base.
        layer_identity: the weights that compute the rows.
        corpus_tokens: tokens of all corpora of the domain.
        documents: digests of their texts.
        inherited: indexes int64 [C, 2] of the ancestors' tables: what they hold is not stored again.
        held: index of the domain's present table. Its n-grams keep their rows as long as they are frequent
            enough for the budget; others need ``min_count`` occurrences of present weight.
        max_promotions: how many n-grams may get a row that have none yet.

    Raises:
        BudgetTooSmallError: the budget is not 0, and not enough for one row.
    """
    row_budget = _row_budget(settings, general, len(documents))
    promotable = _promotable(frequencies, settings.min_count, inherited, held, max_promotions)
    selection = select_rows(
        frequencies.keys[promotable],
        frequencies.counts[promotable],
        budget_bytes=row_budget,
        bytes_per_row=bytes_per_row(general.row_slots, general.hidden_size, settings.row_format),
        min_count=1,
        exclude=inherited,
        total=frequencies.total,
    )
    keys, order = torch.sort(selection.keys)
    candidates = _candidates(frequencies, keys, settings)
    inherited_mass = float(frequencies.counts[_found(frequencies.keys, inherited)].sum())
    metadata = PlotMetadata(
        family=general.family,
        window=general.window,
        plot_layers=general.plot_layers,
        hidden_size=general.hidden_size,
        vocab_size=general.vocab_size,
        placeholder_token_id=general.placeholder_token_id,
        row_dtype=general.row_dtype,
        row_format=settings.row_format,
        layer_identity=layer_identity,
        corpus_tokens=corpus_tokens,
        min_count=settings.min_count,
        admission_count=selection.admission_count,
        total_weight=frequencies.total,
        corpus_weight=frequencies.corpus_weight,
        occurrence_weight=frequencies.occurrence_weight,
    )
    return TablePlan(
        keys=keys,
        counts=selection.counts[order],
        candidate_keys=candidates.keys,
        candidate_counts=candidates.counts,
        documents=documents,
        metadata=metadata,
        statistics={
            "hit_mass": selection.hit_mass,
            "inherited_mass": inherited_mass / max(frequencies.total, 1.0),
        },
    )


def largest_useful_count(settings: TableSettings, general: GeneralInfo, inherited: Sequence[Tensor]) -> int:
    """Returns how many of the most frequent n-grams a plan has use for, so that counting keeps no more."""
    row_bytes = bytes_per_row(general.row_slots, general.hidden_size, settings.row_format)
    rows = settings.plot_bytes // row_bytes
    candidates = int(settings.plot_bytes * _CANDIDATE_SHARE) // _CANDIDATE_BYTES
    return rows + candidates + sum(len(index) // 2 for index in inherited)


def _row_budget(settings: TableSettings, general: GeneralInfo, num_documents: int) -> int:
    if settings.plot_bytes == 0:
        return 0
    fixed = codebook_bytes(settings.row_format, general.row_slots, general.hidden_size)
    row_budget = int(settings.plot_bytes * (1 - _CANDIDATE_SHARE)) - fixed
    row_bytes = bytes_per_row(general.row_slots, general.hidden_size, settings.row_format)
    least = math.ceil((table_bytes(1, row_bytes) + fixed) / (1 - _CANDIDATE_SHARE))
    if settings.plot_bytes < least:
        raise BudgetTooSmallError(
            f"plot_bytes is {format_bytes(settings.plot_bytes)}, but one {settings.row_format} row with its "
            f"index takes {format_bytes(least)}; give the table more, or 0 for none"
        )
    # Of very many short texts only so much is charged that a small table still has rows.
    beside = min(_DIGEST_BYTES * num_documents + _HEADER_BYTES, row_budget // 4)
    return max(row_budget - beside, table_bytes(1, row_bytes))


def _promotable(
    frequencies: Frequencies,
    min_count: int,
    inherited: Sequence[Tensor],
    held: Tensor | None,
    max_promotions: int | None,
) -> Tensor:
    """bool [N]: the n-grams that may have a row in the new table."""
    # Rounded as counts are, so that an n-gram seen just min_count times passes at any weight.
    threshold = max(1, round(min_count * frequencies.occurrence_weight))
    frequent = frequencies.counts >= threshold
    has_row = _found(frequencies.keys, () if held is None else (held,))
    if max_promotions is not None:
        new = (frequent & ~has_row & ~_found(frequencies.keys, inherited)).nonzero()[:, 0]
        rarest = frequencies.counts[new].argsort(descending=True, stable=True)[max_promotions:]
        frequent[new[rarest]] = False
    return frequent | has_row


def _candidates(frequencies: Frequencies, chosen: Tensor, settings: TableSettings) -> Frequencies:
    rest = ~torch.isin(frequencies.keys, chosen, assume_unique=True)
    without_row = Frequencies(frequencies.keys[rest], frequencies.counts[rest])
    return without_row.most_frequent(int(settings.plot_bytes * _CANDIDATE_SHARE) // _CANDIDATE_BYTES)


def _found(keys: Tensor, indexes: Sequence[Tensor]) -> Tensor:
    """bool like ``keys``: is the n-gram in one of the tables?"""
    found = torch.zeros(len(keys), dtype=torch.bool)
    for index in indexes:
        found |= hmi_kernels.plot_index_find(index, keys) >= 0
    return found
