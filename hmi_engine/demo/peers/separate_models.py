"""The plain way: every tenant has its own full model, its LoRA merged into the weights."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import BertForSequenceClassification

from hmi_engine.demo.peers.interface import ServedTenant
from hmi_engine.demo.peers.transformers_batch import (
    TransformersPeer,
    by_tenant,
    load_base,
    require_peft,
    with_equal_heads,
)
from hmi_engine.request import Request

__all__ = ["OneModelPerTenant"]


class OneModelPerTenant(TransformersPeer):
    """A full ``BertForSequenceClassification`` for each tenant, with nothing added to its computation.

    All are kept in memory. The word embeddings, which no tenant changes, are held once to spare the memory of
    the machine that measures; that does not change the speed.
    """

    name = "one model per tenant"
    description = (
        "a full model for each tenant, LoRA merged; a batch's texts of a tenant are computed together"
    )

    def _load(self, tenants: Sequence[ServedTenant]) -> None:
        require_peft()
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            copies, num_rows, pooling = with_equal_heads(tenants, Path(folder))
            base = load_base(self._base, num_rows, pooling)
            self._models: dict[str, BertForSequenceClassification] = {}
            for tenant in copies:
                adapted = PeftModel.from_pretrained(_copy(base), tenant.directory)
                merged = adapted.merge_and_unload().eval().requires_grad_(False)
                self._models[tenant.name] = merged.to(self._device, self._dtype)

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        yield from by_tenant(requests)

    def _logits(
        self, tenants: Sequence[str], input_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        logits: torch.Tensor = self._models[tenants[0]](input_ids, attention_mask=mask).logits
        return logits

    def close(self) -> None:
        """Gives the models back."""
        self._models.clear()


def _copy(model: BertForSequenceClassification) -> BertForSequenceClassification:
    shared = model.get_input_embeddings().weight
    return copy.deepcopy(model, {id(shared): shared})
