"""What generates beside HMI: transformers with PEFT, one tenant after another, or mixed in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["Prompts", "generate_mixed", "generate_one_at_a_time", "load_peft", "write_adapters"]

Prompts = Sequence[tuple[str, list[int]]]
"""Of each request its tenant and its prompt's token ids."""


def write_adapters(base: Path, folder: Path, names: Sequence[str], *, rank: int, first_layer: int) -> None:
    """Writes a LoRA of random weights for each name, by PEFT, from layer ``first_layer`` on."""
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(base)
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=["c_attn"],
        layers_to_transform=list(range(first_layer, model.config.n_layer)),
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    adapted: Any = get_peft_model(model, config)
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(number)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
        adapted.save_pretrained(folder / name)


def load_peft(
    base: Path,
    folder: Path,
    names: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """One base model with all adapters, unmerged."""
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    first, *others = names
    model = PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(base), folder / first, adapter_name=first, low_cpu_mem_usage=True
    )
    for name in others:
        model.load_adapter(folder / name, adapter_name=name, low_cpu_mem_usage=True)
    return model.eval().requires_grad_(False).to(device, dtype)


@torch.no_grad()
def generate_one_at_a_time(model: PeftModel, prompts: Prompts, count: int) -> list[list[int]]:
    """``count`` tokens for each prompt, greedily: a call of ``generate`` for each tenant's own prompts."""
    results: list[list[int]] = [[] for _ in prompts]
    for tenant in dict.fromkeys(name for name, _ in prompts):
        own = [number for number, (name, _) in enumerate(prompts) if name == tenant]
        model.set_adapter(tenant)
        texts = _generate(model, [prompts[number][1] for number in own], count)
        for number, text in zip(own, texts, strict=True):
            results[number] = text
    return results


@torch.no_grad()
def generate_mixed(model: PeftModel, prompts: Prompts, count: int) -> list[list[int]]:
    """The same in one padded batch, by PEFT's ``adapter_names``."""
    names = [name for name, _ in prompts]
    return _generate(model, [ids for _, ids in prompts], count, adapter_names=names)


def _generate(model: PeftModel, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    generated = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        **options,
    )
    return [row.tolist() for row in generated[:, width:]]
