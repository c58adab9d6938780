"""From a sequence's last hidden states to what its tenant's head says."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from hmi_engine.errors import HmiError
from hmi_engine.knowledge.heads import (
    ClassificationHead,
    DenseLayer,
    EmbeddingHead,
    GenerationHead,
    HeadKind,
    RegressionHead,
    TokenClassificationHead,
)
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.models.activations import ACTIVATION_FUNCTIONS
from hmi_engine.models.heads import pool
from hmi_engine.models.linear import SharedLinear

__all__ = ["HeadOutput", "apply_dense", "read_out", "with_own_values"]


_MOST_STACKED = 1 << 16
"""Elements of a head's weight: larger ones cost more to lay beside each other than launches do."""


@dataclass(frozen=True)
class HeadOutput:
    """Values of one sequence; they may share memory with those of others.

    Attributes:
        kind: the head's kind.
        labels: the head's labels.
        values: classification: probabilities [C]; token classification: probabilities [n, C]; regression:
            numbers [C]; embedding [H], or [D] with a projection.
        multi_label: whether each label has a probability of its own.
    """

    kind: HeadKind
    labels: tuple[str, ...]
    values: torch.Tensor
    multi_label: bool


def read_out(
    tenants: Sequence[ResidentTenant], hidden_states: Sequence[torch.Tensor], pooler: SharedLinear | None
) -> list[HeadOutput | HmiError]:
    """Applies each tenant's head to its sequence, float32 [n, H]; an error where the base lacks a pooler.

    ``pooler`` is the base's layer on the first token, if it has one.
    """
    poolings = [tenant.head.pooling or "cls" for tenant in tenants]
    pooled = pool(hidden_states, poolings, pooler)
    outputs: list[HeadOutput | HmiError | None] = [None] * len(tenants)
    groups: defaultdict[_Shape, list[int]] = defaultdict(list)
    for index, (tenant, states, vector) in enumerate(zip(tenants, hidden_states, pooled, strict=True)):
        if isinstance(vector, HmiError):
            outputs[index] = vector
        elif (shape := _stackable(tenant)) is not None:
            groups[shape].append(index)
        else:
            outputs[index] = _output(tenant, states, vector)
    for shape, members in groups.items():
        rows = torch.stack([vector for i in members if isinstance(vector := pooled[i], torch.Tensor)])
        together = _outputs_together(shape, [tenants[index] for index in members], rows)
        for index, output in zip(members, together, strict=True):
            outputs[index] = output
    return [output for output in outputs if output is not None]


_Shape = tuple[HeadKind, int, bool]


def _stackable(tenant: ResidentTenant) -> _Shape | None:
    """What heads have in common that a few kernels apply to all of their sequences; None for rare ones."""
    head = tenant.output_head
    assert not isinstance(head, GenerationHead)  # read by the decoder's own loop
    if isinstance(head, EmbeddingHead):
        return (head.kind, 0, head.normalize) if head.projection is None else None
    if isinstance(head, TokenClassificationHead) or head.hidden or head.weight.numel() > _MOST_STACKED:
        return None
    return head.kind, len(head.labels), isinstance(head, ClassificationHead) and head.multi_label


def _outputs_together(
    shape: _Shape, tenants: Sequence[ResidentTenant], pooled: torch.Tensor
) -> list[HeadOutput]:
    """The outputs of heads of one shape for vectors [n, H], one of each: a handful of launches on a GPU."""
    kind, _, flag = shape
    heads = [tenant.output_head for tenant in tenants]
    linear = [head for head in heads if not isinstance(head, EmbeddingHead | GenerationHead)]
    if not linear:
        values = functional.normalize(pooled, dim=1) if flag else pooled
    else:
        weights = torch.stack([head.weight for head in linear])
        biases = torch.stack([head.bias for head in linear])
        values = torch.baddbmm(biases.unsqueeze(2), weights, pooled.unsqueeze(2)).squeeze(2)
        if kind != "regression":
            values = values.sigmoid() if flag else values.softmax(dim=1)
    return [
        HeadOutput(head.kind, head.labels, own, bool(linear) and flag)
        for head, own in zip(heads, values.unbind(), strict=True)
    ]


def _output(tenant: ResidentTenant, hidden_states: torch.Tensor, pooled: torch.Tensor) -> HeadOutput:
    head = tenant.output_head
    assert not isinstance(head, GenerationHead)
    multi_label = isinstance(head, ClassificationHead) and head.multi_label
    if isinstance(head, EmbeddingHead):
        values = pooled if head.projection is None else apply_dense(head.projection, pooled)
        values = functional.normalize(values, dim=0) if head.normalize else values.clone()
    else:
        read = hidden_states if isinstance(head, TokenClassificationHead) else pooled
        for layer in head.hidden:
            read = apply_dense(layer, read)
        values = functional.linear(read, head.weight, head.bias)
        if not isinstance(head, RegressionHead):
            values = values.sigmoid() if multi_label else values.softmax(dim=-1)
    return HeadOutput(head.kind, head.labels, values, multi_label)


def with_own_values(
    outputs: Sequence[HeadOutput | HmiError], values: torch.Tensor
) -> list[HeadOutput | HmiError]:
    """Outputs with copies of their parts of ``values``, float32 [n], which holds all of them in turn."""
    finished: list[HeadOutput | HmiError] = []
    for output in outputs:
        if isinstance(output, HmiError):
            finished.append(output)
            continue
        own, values = values.tensor_split([output.values.numel()])
        finished.append(replace(output, values=own.clone().view(output.values.shape)))
    return finished


def apply_dense(layer: DenseLayer, rows: torch.Tensor) -> torch.Tensor:
    """A head's inner layer: rows [*, in] -> [*, out]."""
    result = functional.linear(rows, layer.weight, layer.bias)
    return result if layer.activation is None else ACTIVATION_FUNCTIONS[layer.activation](result)
