"""The student of a decoder's distillation: domain layers over windows, merge, upper layers, with gradients.

What serves (:mod:`hmi_engine.models.gpt2`) follows no gradients. This computes the same from transformers'
own modules, so that a student is saved as a GPT-2; a test holds both to one result.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2LMHeadModel
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from hmi_engine.models.general_folder import MERGE_LAYER_NORM_EPS

__all__ = ["HierarchicalStudent", "States", "drop_ngrams", "run_blocks", "teacher_states"]


class States(NamedTuple):
    """Of sequences [B, P]: the input of block K, the output of the last block, and the logits."""

    merged: Tensor
    last: Tensor
    logits: Tensor


def run_blocks(blocks: Iterable[GPT2Block], states: Tensor) -> Tensor:
    """Blocks over [B, L, H], each place seeing itself and those before it."""
    for block in blocks:
        states = _run_block(block, states)
    return states


def _run_block(block: GPT2Block, states: Tensor, *, last_only: bool = False) -> Tensor:
    """[B, L, H] -> [B, L, H], or with ``last_only`` [B, 1, H], the last place's."""
    attention = block.attn
    query, key, value = attention.c_attn(block.ln_1(states)).chunk(3, dim=2)
    if last_only:
        query, states = query[:, -1:], states[:, -1:]
    q, k, v = (part.unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
    context = functional.scaled_dot_product_attention(q, k, v, is_causal=not last_only)
    attended = states + attention.c_proj(context.transpose(1, 2).flatten(2))
    output: Tensor = attended + block.mlp(block.ln_2(attended))
    return output


@torch.no_grad()
def teacher_states(model: GPT2LMHeadModel, plot_layers: int, sequences: Tensor) -> States:
    """What the base makes of sequences [B, P]; ``merged`` is what a perfect merge would give."""
    base = model.transformer
    positions = torch.arange(sequences.shape[1], device=sequences.device)
    blocks = cast("list[GPT2Block]", list(base.h))
    merged = run_blocks(blocks[:plot_layers], base.wte(sequences) + base.wpe(positions))
    last = run_blocks(blocks[plot_layers:], merged)
    return States(merged, last, model.lm_head(base.ln_f(last)))


class HierarchicalStudent(nn.Module):
    """A GPT-2 in hierarchical form that learns: domain layers, merge and upper layers.

    Embeddings of words and positions and the final LayerNorm stay the base's.
    """

    def __init__(self, gpt2: GPT2LMHeadModel, plot_layers: int, window: int) -> None:
        """Takes the model over. Raises ValueError if it has no block for domain layers and one above."""
        super().__init__()
        if not 0 < plot_layers < len(gpt2.transformer.h):
            raise ValueError(
                f"plot_layers is {plot_layers}; of {len(gpt2.transformer.h)} blocks, 1 to all but one can be "
                "looked up"
            )
        self.gpt2, self.plot_layers, self.window = gpt2.eval(), plot_layers, window
        self.position_embeddings = nn.Parameter(gpt2.transformer.wpe.weight.detach().clone())
        self.layer_norm = nn.LayerNorm(gpt2.config.n_embd, eps=MERGE_LAYER_NORM_EPS)
        for parameter in gpt2.parameters():
            parameter.requires_grad_(False)
        gpt2.transformer.h.requires_grad_(True)

    @property
    def blocks(self) -> Sequence[GPT2Block]:
        """All blocks of the model."""
        return cast("list[GPT2Block]", list(self.gpt2.transformer.h))

    def forward(self, sequences: Tensor, lengths: Tensor | None = None) -> States:
        """Sequences [B, P], whose token t is read with so many tokens as ``lengths`` [B, P] says.

        By default every window is as wide as it can be.
        """
        merged = self.merge(sequences, lengths)
        last = run_blocks(self.blocks[self.plot_layers :], merged)
        return States(merged, last, self.gpt2.lm_head(self.gpt2.transformer.ln_f(last)))

    def merge(self, sequences: Tensor, lengths: Tensor | None = None) -> Tensor:
        """The input of block K: [B, P] -> [B, P, H]."""
        count = sequences.shape[1]
        positions = torch.arange(count, device=sequences.device)
        possible = (positions + 1).clamp(max=self.window).expand_as(sequences)
        lengths = possible if lengths is None else torch.minimum(lengths, possible)
        rows = self.rows(sequences, lengths)
        merged: Tensor = self.layer_norm(rows + self.position_embeddings[:count])
        return merged

    def rows(self, sequences: Tensor, lengths: Tensor) -> Tensor:
        """The row of each token's window of ``lengths`` tokens, which ends with it; each window once."""
        parts, places = [], []
        for length in range(1, self.window + 1):
            chosen = (lengths == length).flatten().nonzero()[:, 0]
            if len(chosen):
                back = range(length - 1, -1, -1)  # a chosen token has as many before it
                tokens = torch.stack([sequences.flatten()[chosen - places_back] for places_back in back], 1)
                windows, members = tokens.unique(dim=0, return_inverse=True)
                parts.append(self._last_states(windows)[members])
                places.append(chosen)
        order = torch.cat(places).argsort()
        return torch.cat(parts)[order].view(*sequences.shape, -1)

    def _last_states(self, windows: Tensor) -> Tensor:
        """Windows [M, L] of present tokens at positions 0 to L-1: the last slot's states [M, H]."""
        base = self.gpt2.transformer
        slots = torch.arange(windows.shape[1], device=windows.device)
        *below, last = self.blocks[: self.plot_layers]
        states = run_blocks(below, base.wte(windows) + base.wpe(slots))
        return _run_block(last, states, last_only=True)[:, 0]

    def merge_tensors(self) -> dict[str, Tensor]:
        """The contents of ``merge.safetensors``."""
        return {
            "position_embeddings": self.position_embeddings.detach().cpu().clone(),
            "layer_norm.weight": self.layer_norm.weight.detach().cpu().clone(),
            "layer_norm.bias": self.layer_norm.bias.detach().cpu().clone(),
        }


def drop_ngrams(shape: torch.Size, window: int, share: float, generator: torch.Generator) -> Tensor:
    """How many tokens each window of [B, P] tokens keeps, as if a table did not hold some of them.

    A sequence draws which share of its trigrams is missing, up to ``share``; of these, half as large a share
    lacks the bigram too: tables hold bigrams rather than trigrams.
    """
    missing = share * torch.rand(shape[0], 1, generator=generator)
    draws = torch.rand(window - 1, *shape, generator=generator)
    is_short = draws[0] < missing
    if window == 2:
        return 2 - is_short.long()
    return 3 - is_short.long() - (is_short & (draws[1] < missing / 2)).long()
