"""Heads that are applied together say what each says alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch

import hmi_engine as hmi
from hmi_engine.knowledge.heads import DenseLayer
from hmi_engine.pipeline.read_out import read_out

SIZE = 16


def heads():
    """Of every kind and shape, some of them several times."""
    for number in range(4):
        for count in (2, 3):
            labels = tuple(f"l{i}" for i in range(count))
            weight, bias = torch.randn(count, SIZE), torch.randn(count)
            hidden = (DenseLayer(torch.randn(SIZE, SIZE), torch.randn(SIZE), "tanh"),)
            pooling = ("cls", "mean")[number % 2]
            yield hmi.ClassificationHead(labels, weight, bias, pooling)
            yield hmi.ClassificationHead(labels, weight, bias, pooling, multi_label=True)
            yield hmi.ClassificationHead(labels, weight, bias, pooling, hidden=hidden)
            yield hmi.RegressionHead(labels, weight, bias, pooling)
            yield hmi.TokenClassificationHead(labels, weight, bias)
        yield hmi.EmbeddingHead("mean")
        yield hmi.EmbeddingHead("cls", normalize=False)
        yield hmi.EmbeddingHead("mean", projection=hidden[0])


def test_together_as_alone():
    torch.manual_seed(0)
    tenants = [SimpleNamespace(output_head=head, head=head) for head in heads()]
    states = [torch.randn(1 + number % 5, SIZE) for number in range(len(tenants))]
    model = SimpleNamespace(pooler=None)
    together = read_out(tenants, states, model.pooler)
    for tenant, rows, found in zip(tenants, states, together, strict=True):
        (alone,) = read_out([tenant], [rows], model.pooler)
        assert (found.kind, found.labels, found.multi_label) == (alone.kind, alone.labels, alone.multi_label)
        torch.testing.assert_close(found.values, alone.values)
        if found.kind == "regression":
            head = tenant.output_head
            pooled = rows.mean(0) if head.pooling == "mean" else rows[0]
            torch.testing.assert_close(found.values, head.weight @ pooled + head.bias)
