"""From a sequence's last hidden states to what its tenant's head says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from hmi_engine.errors import HmiError
from hmi_engine.knowledge.heads import HeadKind
from hmi_engine.memory.residency import ResidentTenant
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.heads import pool

__all__ = ["HeadOutput", "read_out"]


@dataclass(frozen=True)
class HeadOutput:
    """Values of one sequence, on tensors of its own.

    Attributes:
        kind: the head's kind.
        labels: the head's labels.
        values: classification: probabilities [C]; token classification: probabilities [n, C]; embedding [H].
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
    head = tenant.head
    if head.kind == "embedding":
        values = functional.normalize(pooled, dim=0) if head.normalize else pooled.clone()
    else:
        read = hidden_states if head.kind == "token_classification" else pooled
        logits = functional.linear(read, tenant.head_weight(), tenant.head_bias())
        values = logits.sigmoid() if head.multi_label else logits.softmax(dim=-1)
    return HeadOutput(head.kind, head.labels, values, head.multi_label)
