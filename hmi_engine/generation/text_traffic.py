"""Counts what decoders ask their tables for, when texts have ended."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hmi_engine.errors import HmiError
from hmi_engine.memory.causal_view import CausalPlotView, CausalTokens
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.models.packing import PackedSequences, causal_windows
from hmi_engine.pipeline.traffic_saver import TrafficSaver

__all__ = ["TextTraffic"]

_TEXTS_AT_ONCE = 32


class TextTraffic:
    """Prompts and what was generated behind them, many texts at a time: one by one would cost each step.

    A step looks single tokens up, and what it finds depends on what the cache held already. So texts are
    looked up once more as wholes. For one thread.
    """

    def __init__(self, saver: TrafficSaver, plots: PlotLibrary, model: HierarchicalGpt2, window: int) -> None:
        """Nothing waits to be counted."""
        self._saver = saver
        self._plots = plots
        self._model = model
        self._window = window
        self._texts: list[tuple[str, list[int]]] = []

    def add(self, domain: str, token_ids: Sequence[int]) -> None:
        """Counts a text of at least one token, now or with those that follow."""
        self._texts.append((domain, list(token_ids)))
        if len(self._texts) >= _TEXTS_AT_ONCE:
            self.flush()

    def flush(self) -> None:
        """Counts what waits, and saves all counts if it is time."""
        texts, self._texts = self._texts, []
        for domain in dict.fromkeys(domain for domain, _ in texts):
            sequences = PackedSequences.pack([token_ids for of, token_ids in texts if of == domain])
            try:
                hits = self._hits(sequences, domain)
            except HmiError:
                continue  # removed meanwhile, or damaged: requests say so, and counts are of no use
            self._saver.recorder.record(sequences, [domain] * sequences.num_sequences, hits)
        self._saver.save_if_due()

    def _hits(self, sequences: PackedSequences, domain: str) -> torch.Tensor:
        """bool [T]: whether a table, not the overlay, has the token's whole window; none is a token alone."""
        windows = causal_windows(sequences, self._window)
        domains = [domain] * sequences.num_tokens
        tokens = CausalTokens(windows, sequences.input_ids, sequences.positions(), domains)
        with CausalPlotView(self._plots.reading([domain]), self._model) as view:
            return view.in_tables(view.lookup(tokens)[:, 0]) & (windows[:, 1] >= 0)
