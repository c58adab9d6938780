"""How much of a text a domain's tables hold: what a person asks before serving it, and after an update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch

import hmi_kernels
from hmi_engine.memory.missing_windows import find_missing
from hmi_engine.memory.plot_view import PlotView
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.packing import PackedSequences, window_tokens
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["Coverage", "measure_coverage"]

_TEXTS_PER_LOOKUP = 256


@dataclass
class Coverage:
    """What a domain's tables and its ancestors' hold of a sample.

    A window is a bigram in a store of ``window=2`` and a trigram in one of ``window=3``, where those at the
    ends of a text have two tokens. Tokens' own rows are not counted: every token of the vocabulary has one.

    Attributes:
        tokens: of the sample, with special ones.
        windows: that a batch of these texts looks up.
        found: how many of them have a row.
        found_in: the same by the domain whose table holds the row, nearest first.
        composed: windows of three tokens without a row, both of whose bigrams have one.
        distinct_missing: different windows without a row, which ``miss="exact"`` would compute.
    """

    tokens: int = 0
    windows: int = 0
    found: int = 0
    found_in: dict[str, int] = field(default_factory=dict)
    composed: int = 0
    distinct_missing: int = 0

    @property
    def share(self) -> float:
        """``found`` over ``windows``; 0 where there are none."""
        return self.found / max(1, self.windows)


def measure_coverage(
    plots: PlotLibrary, encoder: TextEncoder, domains: Sequence[str], texts: Iterable[str], *, window: int
) -> dict[str, Coverage]:
    """Looks a sample up in each of several domains, as a batch of requests would be.

    Args:
        plots: the store's tables; what was computed in traffic counts as found, in no domain's table.
        encoder: the store's tokenizer; texts are cut to its longest.
        domains: names.
        texts: streamed.
        window: width of the store's windows.

    Raises:
        UnknownDomainError: no such domain.
        StoreCorruptError: a table cannot be read.
    """
    measured = {name: Coverage() for name in domains}
    missing: dict[str, list[torch.Tensor]] = {name: [] for name in domains}
    for sequences in _packed(encoder, texts):
        for name, coverage in measured.items():
            with plots.reading([name]) as view:
                missing[name].append(_add(coverage, view, name, sequences, window))
    for name, keys in missing.items():
        if keys:
            measured[name].distinct_missing = len(torch.unique(torch.cat(keys)))
    return measured


def _packed(encoder: TextEncoder, texts: Iterable[str]) -> Iterator[PackedSequences]:
    source = iter(texts)
    while batch := list(islice(source, _TEXTS_PER_LOOKUP)):
        yield PackedSequences.pack(encoder.token_ids(batch))


def _add(
    coverage: Coverage, view: PlotView, domain: str, sequences: PackedSequences, window: int
) -> torch.Tensor:
    """Counts one batch, and returns the keys of its missing windows, int64 [M]."""
    references = view.lookup(sequences, [domain] * sequences.num_sequences)
    found = references[:, 0][references[:, 0] >= 0]
    coverage.tokens += sequences.num_tokens
    coverage.windows += sequences.num_tokens
    if window == 2:  # the last token of a text begins no bigram
        coverage.windows -= sequences.num_sequences
    coverage.found += len(found)
    for name, rows in _rows_by_table(view, domain, found):
        coverage.found_in[name] = coverage.found_in.get(name, 0) + rows
    if window == 3:
        absent = window_tokens(sequences, window) < 0
        without_row = references[:, 0] < 0
        inner = ~absent.any(dim=1)
        coverage.composed += int((without_row & inner & (references[:, 1:] >= 0).all(dim=1)).sum())
    identity = [domain] * sequences.num_sequences
    lacking = find_missing(sequences, references, identity, window=window)
    return torch.cat([part.keys for part in lacking]) if lacking else torch.empty(0, dtype=torch.int64)


def _rows_by_table(view: PlotView, domain: str, found: torch.Tensor) -> list[tuple[str, int]]:
    # A view of one domain numbers the tables of its chain from the nearest on.
    names = [name for name in view.ancestors(domain) if view.table(name) is not None]
    rows = torch.bincount(found >> hmi_kernels.ROW_BITS, minlength=len(names)).tolist()
    return list(zip(names, rows, strict=False))
