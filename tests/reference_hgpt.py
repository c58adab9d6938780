"""hGPT and every kind of adapter block once more, in plain torch on transformers' own weights: an oracle."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from reference_adapters import bottleneck, low_rank
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel

Ngram = tuple[int, ...]


class ReferenceHgpt:
    """One text at a time; rows are computed for each token, whether a table would hold them or not."""

    def __init__(self, model: GPT2LMHeadModel, plot_layers: int, *, window: int = 3) -> None:
        self.model = model.eval()
        self.plot_layers = plot_layers
        self.window = window
        self.heads = model.config.n_head
        self.merge_positions = model.transformer.wpe.weight.detach()

    @torch.no_grad()
    def logits(
        self,
        token_ids: Sequence[int],
        blocks: Mapping[tuple[int, str], object] | None = None,
        *,
        table: Collection[Ngram] | None = None,
    ) -> Tensor:
        """Logits [T, V]. ``table``: the n-grams that have rows, None for all."""
        hidden = self.enter(token_ids, table)
        for layer in range(self.plot_layers, len(self.model.transformer.h)):
            hidden = self.block(layer, hidden, blocks or {})
        return self.model.lm_head(self.model.transformer.ln_f(hidden))

    @torch.no_grad()
    def last_state(self, token_ids: Sequence[int], blocks=None) -> Tensor:
        """The last token's hidden state after the final LayerNorm [H]."""
        hidden = self.enter(token_ids, None)
        for layer in range(self.plot_layers, len(self.model.transformer.h)):
            hidden = self.block(layer, hidden, blocks or {})
        return self.model.transformer.ln_f(hidden)[-1]

    def enter(self, token_ids: Sequence[int], table: Collection[Ngram] | None) -> Tensor:
        """The input of layer K [T, H]."""
        base = self.model.transformer
        if not self.plot_layers:
            return base.wte(torch.tensor(token_ids)) + base.wpe.weight[: len(token_ids)]
        rows = [self.row(self.ngram_of(token_ids, t, table)) for t in range(len(token_ids))]
        summed = torch.stack(rows) + self.merge_positions[: len(token_ids)]
        return functional.layer_norm(summed, summed.shape[-1:], eps=1e-5)

    def ngram_of(self, token_ids: Sequence[int], t: int, table: Collection[Ngram] | None) -> Ngram:
        """What token t's row is of: its window, or what stands for it."""
        ngram = tuple(token_ids[max(0, t - self.window + 1) : t + 1])
        while len(ngram) > 1 and table is not None and ngram not in table:
            ngram = ngram[1:]
        return ngram

    def row(self, ngram: Ngram) -> Tensor:
        """The last slot of a window after the domain layers [H]."""
        base = self.model.transformer
        hidden = base.wte(torch.tensor(ngram)) + base.wpe.weight[: len(ngram)]
        for layer in range(self.plot_layers):
            hidden = self.block(layer, hidden, {})
        return hidden[-1]

    def block(self, layer: int, hidden: Tensor, blocks: Mapping[tuple[int, str], object]) -> Tensor:
        """One block of GPT-2 with a tenant's blocks at their sites [T, H] -> [T, H]."""
        own = {str(site): block for (at, site), block in blocks.items() if at == layer}
        h = self.model.transformer.h[layer]
        size = hidden.shape[-1]
        normalized = _plus_bias(h.ln_1(hidden), own, "attention_norm")
        weight, bias = h.attn.c_attn.weight, h.attn.c_attn.bias
        parts = []
        for number, name in enumerate(("query", "key", "value")):
            columns = slice(number * size, (number + 1) * size)
            parts.append(_linear(normalized, weight[:, columns], bias[columns], own, name))
        context = self._attend(*parts)
        attended = _linear(context, h.attn.c_proj.weight, h.attn.c_proj.bias, own, "attention_output")
        if "after_attention" in own:
            attended = attended + bottleneck(own["after_attention"], attended)
        hidden = hidden + attended
        return self._feed_forward(h, hidden, own)

    def _feed_forward(self, h, hidden: Tensor, own: Mapping[str, object]) -> Tensor:
        normalized = _plus_bias(h.ln_2(hidden), own, "ffn_norm")
        inner = h.mlp.act(_linear(normalized, h.mlp.c_fc.weight, h.mlp.c_fc.bias, own, "ffn_up"))
        output = _linear(inner, h.mlp.c_proj.weight, h.mlp.c_proj.bias, own, "ffn_down")
        if "after_ffn" in own:
            output = output + bottleneck(own["after_ffn"], output)
        if "parallel_ffn" in own:
            output = output + bottleneck(own["parallel_ffn"], hidden)
        output = output + hidden
        if "after_ffn_normalized" in own:
            output = output + bottleneck(own["after_ffn_normalized"], output)
        return output

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (self.heads, -1)).transpose(0, 1) for part in (query, key, value))
        scores = q @ k.transpose(1, 2) / k.shape[-1] ** 0.5
        is_later = torch.ones_like(scores[0], dtype=torch.bool).triu(1)
        return (scores.masked_fill(is_later, -torch.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, own: Mapping[str, object], name: str) -> Tensor:
    """The input scaled, the base's linear, LoRA, the tenant's bias, the tenant's scale."""
    if f"{name}.input_scale" in own:
        x = x * own[f"{name}.input_scale"].vector
    y = x @ weight + bias
    if name in own:
        y = y + low_rank(own[name], x)
    if f"{name}.bias" in own:
        y = y + own[f"{name}.bias"].vector
    if f"{name}.scale" in own:
        y = y * own[f"{name}.scale"].vector
    return y


def _plus_bias(x: Tensor, own: Mapping[str, object], name: str) -> Tensor:
    return x + own[f"{name}.bias"].vector if f"{name}.bias" in own else x


def generate_greedily(
    next_logits: Callable[[list[int]], Tensor], prompt: Sequence[int], count: int, end: int | None
) -> list[int]:
    """Token by token, each time over the whole text."""
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(int(next_logits(token_ids).argmax()))
        if token_ids[-1] == end:
            break
    return token_ids[len(prompt) :]
