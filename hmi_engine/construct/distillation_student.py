"""The student: domain layers over windows, the merge, and upper layers, all with gradients.

The layers that serve (:mod:`hmi_engine.models`) change tensors in place and follow no gradients. These here
compute the same from transformers' own modules, so that a student is saved as a BERT; a test holds both to
one result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmi_engine.construct.distillation_settings import Part
from hmi_engine.construct.distillation_windows import MergePlan
from hmi_engine.models.general_folder import MERGE_LAYER_NORM_EPS
from hmi_engine.models.packing import PackedSequences

if TYPE_CHECKING:
    from transformers import BertModel
    from transformers.models.bert.modeling_bert import BertLayer

__all__ = [
    "DenseShape",
    "Merge",
    "Student",
    "embed_tokens",
    "encoder_layers",
    "load_bert",
    "run_layers",
    "value_relations",
]


def load_bert(directory: Path) -> BertModel:
    """The base model of a store's folder, in float32, without dropout."""
    from transformers import BertModel

    model: BertModel = BertModel.from_pretrained(directory, use_safetensors=True, dtype=torch.float32)
    model.eval()
    return model


def encoder_layers(bert: BertModel) -> list[BertLayer]:
    """All layers of a base model."""
    return cast("list[BertLayer]", list(bert.encoder.layer))


class DenseShape:
    """Where the tokens of packed sequences stand when each sequence is padded to the longest."""

    def __init__(self, sequences: PackedSequences, device: torch.device) -> None:
        lengths = torch.tensor(sequences.lengths)
        self.shape = (len(lengths), int(lengths.max()))
        places = torch.repeat_interleave(torch.arange(len(lengths)) * self.shape[1], lengths)
        self._positions = sequences.positions()
        self._places = (places + self._positions).to(device)
        present = torch.arange(self.shape[1]) < lengths[:, None]
        self.mask = None if bool(present.all()) else present[:, None, None].to(device)

    def positions(self) -> Tensor:
        """Index of each packed token in its sequence, int64 [T]."""
        return self._positions.to(self._places.device)

    def pad(self, packed: Tensor) -> Tensor:
        """[T, H] -> [B, L, H], zero in padded places."""
        if self.mask is None:
            return packed.view(*self.shape, -1)
        padded = packed.new_zeros(self.shape[0] * self.shape[1], packed.shape[1])
        return padded.index_copy(0, self._places, packed).view(*self.shape, -1)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, L, H] -> [T, H]."""
        flat = padded.flatten(0, 1)
        return flat if self.mask is None else flat[self._places]


class Merge(nn.Module):
    """``LayerNorm(sum of rows + position_embeddings[t])``."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """Takes ``merge.safetensors`` of a store."""
        super().__init__()
        self.position_embeddings = nn.Parameter(tensors["position_embeddings"].clone())
        size = self.position_embeddings.shape[1]
        self.layer_norm = nn.LayerNorm(size, eps=MERGE_LAYER_NORM_EPS)
        with torch.no_grad():
            self.layer_norm.weight.copy_(tensors["layer_norm.weight"])
            self.layer_norm.bias.copy_(tensors["layer_norm.bias"])

    def forward(self, rows: Tensor, plan: MergePlan, positions: Tensor) -> Tensor:
        """Rows [R, H] -> merged states [T, H]."""
        combined = self.combine(rows, plan, positions)
        merged: Tensor = self.layer_norm(combined + self.position_embeddings[positions])
        return merged

    def combine(self, rows: Tensor, plan: MergePlan, positions: Tensor) -> Tensor:
        """Rows [R, H] -> the sum of each token's, [T, H]; another form of merge replaces this alone."""
        return functional.embedding_bag(
            plan.rows, rows, plan.offsets, mode="sum", per_sample_weights=plan.coefficients.to(rows.dtype)
        )


class Student(nn.Module):
    """A base model in hierarchical form that learns."""

    def __init__(self, bert: BertModel, merge: dict[str, Tensor], plot_layers: int) -> None:
        super().__init__()
        self.bert, self.merge = bert, Merge(merge)
        self.plot_layers = plot_layers

    @property
    def domain_layers(self) -> Sequence[BertLayer]:
        """Layers 0 to K-1."""
        return encoder_layers(self.bert)[: self.plot_layers]

    @property
    def upper_layers(self) -> Sequence[BertLayer]:
        """Layers K to N-1."""
        return encoder_layers(self.bert)[self.plot_layers :]

    def parts(self, part: Part) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of a part."""
        for name, parameter in self.named_parameters():
            if self._part_of(name) == part:
                yield name, parameter

    def _part_of(self, name: str) -> Part | None:
        prefix = "bert.encoder.layer."
        if name.startswith("merge."):
            return "merge"
        if not name.startswith(prefix):
            return None  # embeddings and pooler stay the base's
        number = int(name.removeprefix(prefix).split(".")[0])
        return "domain" if number < self.plot_layers else "upper"

    def window_rows(self, plan: MergePlan) -> Tensor:
        """All rows of a plan through the domain layers, [M * W + A, H]."""
        width = plan.windows.shape[1]
        rows = self._run_windows(plan.windows.T.flatten(), width)
        if not len(plan.tokens):
            return rows
        return torch.cat([rows, self._run_windows(plan.tokens, 1)])

    def _run_windows(self, tokens: Tensor, width: int) -> Tensor:
        """tokens [W * M], all windows' slot 0 first -> [W * M, H]."""
        slots = torch.arange(width, device=tokens.device).repeat_interleave(len(tokens) // width)
        # What the first layer makes of a token at a slot by itself is computed once for each.
        pairs, members = (tokens * width + slots).unique(return_inverse=True)
        embedded = embed_tokens(self.bert, pairs // width, pairs % width)
        first, *others = self.domain_layers
        x, projected = embedded[members], _project(first, embedded)[members]
        x = _finish(first, _window_attention(projected, width, _num_heads(first)), x)
        for layer in others:
            context = _window_attention(_project(layer, x), width, _num_heads(layer))
            x = _finish(layer, context, x)
        return x


def embed_tokens(bert: BertModel, tokens: Tensor, positions: Tensor) -> Tensor:
    """The embedding layer of tokens [N] at positions [N], token type 0: [N, H]."""
    embeddings = bert.embeddings
    summed = (
        embeddings.word_embeddings(tokens)
        + embeddings.position_embeddings(positions)
        + embeddings.token_type_embeddings.weight[0]
    )
    normalized: Tensor = embeddings.LayerNorm(summed)
    return normalized


def run_layers(layers: Sequence[BertLayer], hidden_states: Tensor, dense: DenseShape) -> list[Tensor]:
    """Layers over packed hidden states [T, H]; the output of each, [T, H]."""
    outputs = []
    x = dense.pad(hidden_states)
    for layer in layers:
        heads = (*x.shape[:2], 3, _num_heads(layer), -1)
        query, key, value = _project(layer, x.flatten(0, 1)).view(heads).permute(2, 0, 3, 1, 4)
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=dense.mask)
        context = context.transpose(1, 2).reshape(-1, x.shape[2])
        x = _finish(layer, context, x.flatten(0, 1)).view_as(x)
        outputs.append(dense.pack(x))
    return outputs


def value_relations(layer: BertLayer, hidden_states: Tensor, dense: DenseShape) -> Tensor:
    """Log-probabilities of a layer's value-value relations, [tokens, heads, L].

    ``log softmax(V V^T / sqrt(d))`` of each head and token over the tokens of its sequence: what MiniLM
    (Wang et al. 2020, section 3.2) transfers of a last layer, next to its attention.
    """
    attention = layer.attention.self
    value = dense.pad(attention.value(hidden_states)).unflatten(2, (_num_heads(layer), -1)).transpose(1, 2)
    scores = value @ value.transpose(2, 3) * value.shape[3] ** -0.5
    if dense.mask is not None:
        scores = scores.masked_fill(~dense.mask, torch.finfo(scores.dtype).min)
    relations = scores.log_softmax(-1).transpose(1, 2)
    packed: Tensor = dense.pack(relations.flatten(2))
    return packed.view(len(packed), _num_heads(layer), -1)


def _num_heads(layer: BertLayer) -> int:
    return int(layer.attention.self.num_attention_heads)


def _project(layer: BertLayer, x: Tensor) -> Tensor:
    """Queries, keys and values side by side: [N, H] -> [N, 3H]."""
    attention = layer.attention.self
    parts = (attention.query, attention.key, attention.value)
    weight, bias = torch.cat([part.weight for part in parts]), torch.cat([part.bias for part in parts])
    return functional.linear(x, weight, bias)


def _finish(layer: BertLayer, context: Tensor, x: Tensor) -> Tensor:
    """What follows the attention: [N, H] -> [N, H]."""
    output = layer.attention.output
    attended = output.LayerNorm(output.dense(context) + x)
    inner = functional.gelu(layer.intermediate.dense(attended))
    finished: Tensor = layer.output.LayerNorm(layer.output.dense(inner) + attended)
    return finished


def _window_attention(projected: Tensor, width: int, num_heads: int) -> Tensor:
    """Attention within windows: [W * M, 3H] -> [W * M, H]; elementwise, as tiny matrix products cost more."""
    size = projected.shape[1] // 3
    by_slot = projected.view(width, -1, 3, num_heads, size // num_heads)
    queries, keys, values = by_slot.unbind(2)
    if width == 1:
        return values.reshape(-1, size)
    scale = queries.shape[-1] ** -0.5
    if width == 2:  # the softmax over two is the sigmoid of their difference
        weights = ((queries * (keys[0] - keys[1])).sum(-1, keepdim=True) * scale).sigmoid()
        attended: Tensor = values[1] + weights * (values[0] - values[1])
        return attended.view(-1, size)
    scores = torch.stack([(queries * key).sum(-1, keepdim=True) for key in keys]) * scale
    context: Tensor = (scores.softmax(0) * values[:, None]).sum(0)
    return context.view(-1, size)
