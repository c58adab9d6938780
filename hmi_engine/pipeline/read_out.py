"""From a sequence's last hidden states to what its tenant's head says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from hmi_engine.errors import HmiError
from hmi_engine.knowledge.heads import (
    ClassificationHead,
    DenseLayer,
    EmbeddingHead,
    HeadKind,
    RegressionHead,
    TokenClassificationHead,
)
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.models.activations import ACTIVATION_FUNCTIONS
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.heads import pool

__all__ = ["HeadOutput", "apply_dense", "read_out"]


@dataclass(frozen=True)
class HeadOutput:
    """Values of one sequence, on tensors of its own.

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
    tenants: Sequence[ResidentTenant], hidden_states: Sequence[torch.Tensor], model: HierarchicalBert
) -> list[HeadOutput | HmiError]:
    """Applies each tenant's head to its sequence, float32 [n, H]; an error where the base lacks a pooler."""
    poolings = [tenant.head.pooling or "cls" for tenant in tenants]
    pooled = pool(hidden_states, poolings, model.pooler)
    return [
        vector if isinstance(vector, HmiError) else _output(tenant, states, vector)
        for tenant, states, vector in zip(tenants, hidden_states, pooled, strict=True)
    ]


def _output(tenant: ResidentTenant, hidden_states: torch.Tensor, pooled: torch.Tensor) -> HeadOutput:
    head = tenant.output_head
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


def apply_dense(layer: DenseLayer, rows: torch.Tensor) -> torch.Tensor:
    """A head's inner layer: rows [*, in] -> [*, out]."""
    result = functional.linear(rows, layer.weight, layer.bias)
    return result if layer.activation is None else ACTIVATION_FUNCTIONS[layer.activation](result)
