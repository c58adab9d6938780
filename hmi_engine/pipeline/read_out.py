"""From a sequence's last hidden states to what its tenant's head says."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from hmi_engine.errors import HmiError, InvalidHeadError
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
    tenant: ResidentTenant, hidden_states: torch.Tensor, model: HierarchicalBert
) -> HeadOutput | HmiError:
    """Applies a tenant's head to float32 [n, H]; an error where the head asks for what the base lacks."""
    head = tenant.head
    try:
        if head.kind == "token_classification":
            values = functional.linear(hidden_states, tenant.head_weight(), tenant.head_bias()).softmax(-1)
        else:
            pooled = pool(hidden_states, head.pooling or "cls", model.pooler)
            values = _pooled_output(tenant, pooled)
    except InvalidHeadError as error:
        return error
    return HeadOutput(head.kind, head.labels, values, head.multi_label)


def _pooled_output(tenant: ResidentTenant, pooled: torch.Tensor) -> torch.Tensor:
    head = tenant.head
    if head.kind == "embedding":
        return functional.normalize(pooled, dim=0) if head.normalize else pooled.clone()
    logits = functional.linear(pooled, tenant.head_weight(), tenant.head_bias())
    return logits.sigmoid() if head.multi_label else logits.softmax(dim=0)
