"""The models whose perplexity is measured: the base by transformers, its hierarchical form by HMI."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel

from benchmarks.perplexity_scores import Scores, batches_of, document_losses
from hmi_engine.errors import UnsupportedModelError
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.memory.causal_view import CausalPlotView, CausalTokens
from hmi_engine.memory.plots import PlotLibrary
from hmi_engine.models.general_folder import MERGE_FILE
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.models.packing import PackedSequences, causal_windows
from hmi_engine.store import Store

__all__ = ["Computed", "HierarchicalModel", "base_scores"]

DOCUMENTS_AT_ONCE = 32


class Computed(NamedTuple):
    """Logits [T, V] after each token of packed documents; where their rows were found, [T, 2]."""

    logits: Tensor
    references: Tensor | None


def base_scores(folder: Path, documents: Sequence[list[int]]) -> Scores:
    """The base model as transformers computes it."""
    model = GPT2LMHeadModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32).eval()

    @torch.no_grad()
    def compute(chosen: Sequence[list[int]]) -> Computed:
        longest = max(map(len, chosen))
        padded = torch.tensor([ids + [0] * (longest - len(ids)) for ids in chosen])
        logits = model(input_ids=padded, use_cache=False).logits  # a causal model never sees what follows
        return Computed(
            torch.cat([row[: len(ids)] for row, ids in zip(logits, chosen, strict=True)]), references=None
        )

    return _score(compute, documents)


class HierarchicalModel(AbstractContextManager["HierarchicalModel"]):
    """A store made of a base model, or of one that ``benchmarks.distil_gpt2`` distilled."""

    def __init__(
        self,
        folder: Path,
        general: Path,
        plot_layers: int,
        *,
        window: Literal[2, 3] = 3,
        row_dtype: Literal["float16", "float32"] = "float16",
    ) -> None:
        """Makes the store in ``folder``.

        Raises UnsupportedModelError if the store has not taken the merge over that ``general`` was given.
        """
        self.store = Store.create(
            folder, general=general, plot_layers=plot_layers, window=window, row_dtype=row_dtype
        )
        merge = general / MERGE_FILE
        if merge.exists():
            kept = load_file(self.store.general_folder / MERGE_FILE)
            if not all(torch.equal(kept[name], tensor) for name, tensor in load_file(merge).items()):
                raise UnsupportedModelError(f"the store did not take {merge} over")
        self._plots = PlotLibrary(
            self.store.layout,
            self.store.catalog,
            self.store.general,
            overlay_bytes=0,  # what an exact run has computed is not for the table runs to find
            domain_layers=self.store.domain_layers,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the store."""
        self._plots.close()
        self.store.close()

    def exact_scores(self, documents: Sequence[list[int]]) -> Scores:
        """Every window's row computed."""
        return _score(lambda chosen: self.compute(chosen, ROOT_DOMAIN, exact=True), documents)

    def table_scores(self, documents: Sequence[list[int]], domain: str) -> Scores:
        """Rows of a domain's table, and back-off where it has none."""
        return _score(lambda chosen: self.compute(chosen, domain, exact=False), documents)

    @torch.no_grad()
    def compute(self, documents: Sequence[list[int]], domain: str, *, exact: bool) -> Computed:
        """Logits of all tokens of packed documents."""
        model = self.store.decoder
        sequences = PackedSequences.pack(list(documents))
        tokens = CausalTokens(
            causal_windows(sequences, self.store.general.window),
            sequences.input_ids,
            sequences.positions(),
            [domain] * sequences.num_tokens,
        )
        with CausalPlotView(self._plots.reading([domain]), model) as view:
            references = view.lookup(tokens)
            if exact:
                references = view.compute_misses(tokens, references).references
            merged = view.merge(tokens, references)
        attention = _DocumentAttention(model, [len(document) for document in documents])
        states = model.run_layers(merged, attention, first=model.plot_layers)
        return Computed(model.logits(states), references)


class _DocumentAttention:
    """Causal attention within each of packed documents; a ``hmi_engine.models.gpt2_block.Attend``."""

    def __init__(self, model: HierarchicalGpt2, lengths: Sequence[int]) -> None:
        self._num_heads = model.configuration.num_heads
        self._lengths = list(lengths)

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries, keys and values [T, H] -> [T, H]."""
        parts = (
            part.unflatten(1, (self._num_heads, -1)).transpose(0, 1).split(self._lengths, dim=1)
            for part in (query, key, value)
        )
        contexts = [
            functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
            for q, k, v in zip(*parts, strict=True)
        ]
        return torch.cat(contexts, dim=1).transpose(0, 1).flatten(1)


def _score(compute: Callable[[Sequence[list[int]]], Computed], documents: Sequence[list[int]]) -> Scores:
    losses = [0.0] * len(documents)
    found, num_tokens = torch.zeros(3), 0
    for places in batches_of(documents, DOCUMENTS_AT_ONCE):
        chosen = [documents[place] for place in places]
        computed = compute(chosen)
        for place, loss in zip(places, document_losses(computed.logits, chosen), strict=True):
            losses[place] = loss
        if computed.references is not None:
            whole, shorter = (computed.references >= 0).unbind(1)
            found += torch.stack([whole.sum(), (~whole & shorter).sum(), (~whole & ~shorter).sum()])
            num_tokens += len(whole)
    shares = tuple((found / num_tokens).tolist()) if num_tokens else ()
    return Scores(tuple(losses), tuple(len(document) - 1 for document in documents), shares)
