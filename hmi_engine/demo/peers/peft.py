"""PEFT with all tenants' LoRA in one model: mixed in one batch, or one tenant after the other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hmi_engine.demo.peers.interface import ServedTenant
from hmi_engine.demo.peers.transformers_batch import (
    TransformersPeer,
    by_tenant,
    load_base,
    require_peft,
    with_equal_heads,
)
from hmi_engine.request import Request

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["PeftMixedBatch", "PeftOneAtATime"]


class _PeftPeer(TransformersPeer):
    """One base model with every tenant's LoRA and classifier, unmerged."""

    def _load(self, tenants: Sequence[ServedTenant]) -> None:
        require_peft()
        from peft import PeftModel

        with tempfile.TemporaryDirectory() as folder:
            copies, num_rows, pooling = with_equal_heads(tenants, Path(folder))
            # PEFT keeps adapters as submodules, whose names cannot hold the dots of a tenant's name.
            self._adapter_names = {tenant.name: f"tenant_{n}" for n, tenant in enumerate(copies)}
            first, *others = copies
            self._model: PeftModel = PeftModel.from_pretrained(
                load_base(self._base, num_rows, pooling),
                first.directory,
                adapter_name=self._adapter_names[first.name],
                low_cpu_mem_usage=True,
            )
            for tenant in others:
                self._model.load_adapter(
                    tenant.directory, adapter_name=self._adapter_names[tenant.name], low_cpu_mem_usage=True
                )
        self._model.eval().requires_grad_(False).to(self._device, self._dtype)

    def close(self) -> None:
        """Gives the model back."""
        del self._model


class PeftMixedBatch(_PeftPeer):
    """PEFT's own way of mixing tenants: ``adapter_names``, one name for each row of the batch."""

    name = "PEFT mixed batch"
    description = "one base model, all LoRA unmerged, adapter_names for each text of the padded batch"

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        yield list(range(len(requests)))

    def _logits(
        self, tenants: Sequence[str], input_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        names = [self._adapter_names[tenant] for tenant in tenants]
        logits: torch.Tensor = self._model(input_ids, attention_mask=mask, adapter_names=names).logits
        return logits


class PeftOneAtATime(_PeftPeer):
    """PEFT switched to one tenant after the other, the batch's texts of a tenant together."""

    name = "PEFT one at a time"
    description = "one base model, all LoRA unmerged, set_adapter for each tenant's texts of the batch"

    def _groups(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        yield from by_tenant(requests)

    def _logits(
        self, tenants: Sequence[str], input_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        name = self._adapter_names[tenants[0]]
        if self._model.active_adapter != name:
            self._model.set_adapter(name)
        logits: torch.Tensor = self._model(input_ids, attention_mask=mask).logits
        return logits
