"""What a step of a decoder reads of the PLOT: look-up of single tokens, missing windows, merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import NamedTuple

import torch

import hmi_kernels
from hmi_engine.memory.missing_windows import MissingWindows
from hmi_engine.memory.plot_view import CompletedReferences, KernelTable, PlotView
from hmi_engine.models.gpt2 import HierarchicalGpt2

__all__ = ["CausalMergeInputs", "CausalPlotView", "CausalTokens", "merge_causal_rows"]


class CausalTokens(NamedTuple):
    """Tokens of any sequences.

    Attributes:
        windows: int32 [T, 3]: each token after those before it, in the order of the text, -1 behind it.
        input_ids: int32 [T], the tokens themselves.
        positions: int64 [T], in their sequences.
        domains: the domain of each token's tenant.
    """

    windows: torch.Tensor
    input_ids: torch.Tensor
    positions: torch.Tensor
    domains: Sequence[str]


class CausalMergeInputs(NamedTuple):
    """A step's tokens, rows and domains, as ``hmi_kernels.causal_merge`` takes them.

    ``references`` int64 [T, 2] are to rows of ``tables``; ``unigrams_of_tokens`` int32 [T] say which of
    ``unigrams`` [V, 1, H] each token uses.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    references: torch.Tensor
    tables: tuple[KernelTable, ...]
    unigrams: tuple[torch.Tensor, ...]
    unigrams_of_tokens: torch.Tensor


class CausalPlotView(AbstractContextManager["CausalPlotView"]):
    """A lease as :class:`~hmi_engine.memory.plot_view.PlotView`, for the tokens of decoders."""

    def __init__(self, view: PlotView, model: HierarchicalGpt2) -> None:
        """Takes over ``view``, to be released with it."""
        self._view = view
        self._model = model

    @property
    def plot_view(self) -> PlotView:
        """The lease itself."""
        return self._view

    def release(self) -> None:
        """Gives the tables back; a second call does nothing."""
        self._view.release()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Releases the view."""
        self.release()

    def lookup(self, tokens: CausalTokens) -> torch.Tensor:
        """Finds each token's row: int64 [T, 2], as ``hmi_kernels.causal_lookup`` describes."""
        references = hmi_kernels.causal_lookup(
            tokens.windows,
            [table.key_index for table in self._view.kernel_tables],
            self._view.chains,
            self._view.places_of(tokens.domains).int(),
        )
        self._view.count_overlay_hits(references)
        return references

    def in_tables(self, references: torch.Tensor) -> torch.Tensor:
        """See :meth:`hmi_engine.memory.plot_view.PlotView.in_tables`."""
        return self._view.in_tables(references)

    def missing(self, tokens: CausalTokens, references: torch.Tensor) -> list[MissingWindows]:
        """The windows that no table holds, each once; a single token is none, its row is its unigram's."""
        is_missing = (references[:, 0] < 0) & (tokens.windows[:, 1] >= 0)
        identities = [self._view.identity_of(domain) for domain in tokens.domains]
        found = []
        for identity in dict.fromkeys(identities):
            chosen = is_missing & torch.tensor([other == identity for other in identities])
            positions = chosen.nonzero()[:, 0]
            if positions.numel():
                keys, members = torch.unique(
                    hmi_kernels.ngram_keys(tokens.windows[positions]), return_inverse=True
                )
                found.append(MissingWindows(identity, keys, positions, members))
        return found

    def compute_misses(
        self,
        tokens: CausalTokens,
        references: torch.Tensor,
        *,
        limit: int | None = None,
        weights: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> CompletedReferences:
        """Computes missing windows, each once, and offers them to the overlay for later steps.

        Args:
            tokens: those that ``references`` were looked up for.
            references: the result of :meth:`lookup`, which is not changed.
            limit: compute at most so many windows, those that the step has most often; default all.
            weights: which of equals, as of :meth:`hmi_engine.memory.plot_view.PlotView.compute_misses`.
        """
        missing = self.missing(tokens, references)
        return self._view.complete(references, missing, self._compute, limit=limit, weights=weights)

    def _compute(self, missing: MissingWindows) -> torch.Tensor:
        """Rows of the windows, in a table that only this view has; returns their references int64 [M]."""
        layers = self._view.layers_of(self._model, missing.identity)
        return self._view.keep_computed(missing, layers(hmi_kernels.ngram_tokens(missing.keys)))

    def merge_inputs(self, tokens: CausalTokens, references: torch.Tensor) -> CausalMergeInputs:
        """What :meth:`merge` reads, all in host memory."""
        return CausalMergeInputs(
            tokens.input_ids,
            tokens.positions,
            references,
            tuple(self._view.kernel_tables),
            tuple(self._view.unigram_tables),
            self._view.places_of(tokens.domains).int(),
        )

    def merge(self, tokens: CausalTokens, references: torch.Tensor) -> torch.Tensor:
        """Layer K's input: rows and positions through the merge's LayerNorm, float32 [T, H]."""
        return merge_causal_rows(self._model, self.merge_inputs(tokens, references))


def merge_causal_rows(model: HierarchicalGpt2, inputs: CausalMergeInputs) -> torch.Tensor:
    """The input of layer K, [T, H], where model and inputs are: see :meth:`CausalPlotView.merge`."""
    norm = model.merge_norm
    return hmi_kernels.causal_merge(
        inputs.input_ids,
        inputs.positions,
        inputs.references,
        [table.rows for table in inputs.tables],
        inputs.unigrams,
        inputs.unigrams_of_tokens,
        model.merge_positions,
        norm.weight,
        norm.bias,
        layer_norm_eps=norm.eps,
        row_scales=[table.row_scales for table in inputs.tables],
        codebooks=[table.codebooks for table in inputs.tables],
    )
