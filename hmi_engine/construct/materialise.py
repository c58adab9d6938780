"""Chooses which n-grams to keep, and computes their rows through the domain layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import hmi_kernels
from hmi_engine.construct.counting import CorpusCounts, Progress
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.plot_table import PlotMetadata, PlotTable
from hmi_engine.knowledge.selection import Selection, bytes_per_row, select_rows
from hmi_engine.models.bert import HierarchicalBert

__all__ = ["build_plot", "build_unigram_plot"]

WINDOWS_PER_BATCH = 8192


def build_plot(
    counts: CorpusCounts,
    model: HierarchicalBert,
    general: GeneralInfo,
    *,
    plot_bytes: int,
    min_count: int,
    inherited: Sequence[torch.Tensor] = (),
    progress: Progress | None = None,
) -> tuple[PlotTable, Selection]:
    """Makes a domain's table: the most frequent windows that fit into ``plot_bytes``.

    Args:
        counts: the corpus.
        model: computes the rows.
        general: the store's base.
        plot_bytes: budget for rows and index.
        min_count: rarer windows are left out.
        inherited: sorted keys int64 of each ancestor's table; what an ancestor holds is not stored again.
        progress: told about the rows.

    Returns:
        The table, and the choice that was made (hit mass on the corpus itself).
    """
    selection = select_rows(
        counts.keys,
        counts.counts,
        budget_bytes=plot_bytes,
        bytes_per_row=bytes_per_row(general.window, general.hidden_size, general.row_dtype),
        min_count=min_count,
        exclude=inherited,
    )
    keys, order = torch.sort(selection.keys)
    tokens = hmi_kernels.ngram_tokens(keys)[:, : general.window]
    table = PlotTable(
        index=hmi_kernels.plot_index_build(keys),
        rows=_compute_rows(tokens, model, getattr(torch, general.row_dtype), "computing rows", progress),
        row_keys=keys,
        row_counts=selection.counts[order],
        unigrams=None,
        documents=counts.documents,
        metadata=_metadata(general, counts.num_tokens, min_count, selection.admission_count),
    )
    return table, selection


def build_unigram_plot(
    model: HierarchicalBert, general: GeneralInfo, *, progress: Progress | None = None
) -> PlotTable:
    """Makes the root's table: the unigram row of every token id, and no n-grams yet."""
    tokens = torch.full((general.vocab_size, general.window), -1, dtype=torch.int32)
    tokens[:, general.window - 2] = torch.arange(general.vocab_size, dtype=torch.int32)
    dtype = getattr(torch, general.row_dtype)
    rows = _compute_rows(tokens, model, dtype, "computing unigram rows", progress)
    none = torch.empty(0, dtype=torch.int64)
    return PlotTable(
        index=hmi_kernels.plot_index_build(none),
        rows=torch.empty(0, general.window, general.hidden_size, dtype=dtype),
        row_keys=none,
        row_counts=none,
        unigrams=rows[:, general.window - 2].contiguous(),
        documents=none,
        metadata=_metadata(general, 0, 0, 0),
    )


def _metadata(general: GeneralInfo, corpus_tokens: int, min_count: int, admission_count: int) -> PlotMetadata:
    return PlotMetadata(
        window=general.window,
        plot_layers=general.plot_layers,
        layer_identity=general.domain_layers,
        hidden_size=general.hidden_size,
        vocab_size=general.vocab_size,
        row_dtype=general.row_dtype,
        corpus_tokens=corpus_tokens,
        min_count=min_count,
        admission_count=admission_count,
    )


@torch.no_grad()
def _compute_rows(
    tokens: torch.Tensor,
    model: HierarchicalBert,
    dtype: torch.dtype,
    step: str,
    progress: Progress | None,
) -> torch.Tensor:
    rows = torch.empty(*tokens.shape, model.configuration.hidden_size, dtype=dtype)
    for start in range(0, len(tokens), WINDOWS_PER_BATCH):
        end = min(start + WINDOWS_PER_BATCH, len(tokens))
        rows[start:end] = model.window_states(tokens[start:end])
        if progress:
            progress(step, end, len(tokens))
    return rows
