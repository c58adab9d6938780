"""Reads GPT-2-architecture checkpoints through transformers; keeps them in a store's ``general`` folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hmi_engine.errors import UnsupportedModelError
from hmi_engine.models.general_folder import (
    MERGE_FILE,
    check_fields,
    load_weights,
    read_checkpoint,
    read_configuration,
    undistilled_merge,
)

__all__ = ["Gpt2Configuration", "import_gpt2", "load_gpt2_configuration", "load_gpt2_tensors"]

ACTIVATIONS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
"""transformers' names of the feed-forward network's activation, and torch's name of the way to compute it."""


@dataclass(frozen=True)
class Gpt2Configuration:
    """The sizes of a GPT-2-architecture decoder, and what else its computation depends on.

    ``activation`` is how GELU is computed: ``"tanh"`` or ``"none"`` (exactly).
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    layer_norm_eps: float
    activation: str

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def from_dictionary(cls, config: dict[str, Any], source: str) -> Gpt2Configuration:
        """Reads the fields of a Hugging Face ``config.json``.

        Raises:
            UnsupportedModelError: another architecture, or a variant of GPT-2 that HMI does not compute.
        """
        expected: dict[str, tuple[Any, ...]] = {
            "model_type": ("gpt2",),
            "activation_function": tuple(ACTIVATIONS),
            "scale_attn_weights": (True, None),
            "scale_attn_by_inverse_layer_idx": (False, None),
            "add_cross_attention": (False, None),
            "tie_word_embeddings": (True, None),
        }
        check_fields(
            config,
            expected,
            source,
            served="decoders of GPT-2's architecture",
            examples="GPT-2, DistilGPT-2",
        )
        hidden_size, num_heads = config["n_embd"], config["n_head"]
        if hidden_size % num_heads:
            raise UnsupportedModelError(f"{source}: n_embd {hidden_size} is no multiple of {num_heads} heads")
        return cls(
            num_layers=config["n_layer"],
            hidden_size=hidden_size,
            num_heads=num_heads,
            intermediate_size=config.get("n_inner") or 4 * hidden_size,
            vocab_size=config["vocab_size"],
            max_positions=config["n_positions"],
            layer_norm_eps=config["layer_norm_epsilon"],
            activation=ACTIVATIONS[config["activation_function"]],
        )


def import_gpt2(source: str, directory: Path) -> Gpt2Configuration:
    """Copies a base model and its tokenizer into ``directory``, in transformers' format.

    ``source`` is a folder or a hub id; a hub id that is not in the local cache is downloaded by transformers,
    because the caller named it. The merge is that of ``merge.safetensors`` beside a model that was distilled;
    else it starts undistilled: the base's own position table, LayerNorm with weight 1 and bias 0.

    Raises:
        UnsupportedModelError: the folder or id holds no readable model, or one of another architecture.
    """
    checkpoint = read_checkpoint(source, "GPT2LMHeadModel", "GPT-2", Gpt2Configuration.from_dictionary)
    tensors = checkpoint.model.transformer.state_dict()
    checkpoint.write(directory, tensors, _merge_of(Path(source), tensors["wpe.weight"]))
    return checkpoint.sizes


def _merge_of(source: Path, positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """The merge of a model that was distilled for look-up, which lies beside it; else the undistilled one."""
    merge = undistilled_merge(positions)
    path = source / MERGE_FILE
    if not path.exists():
        return merge
    try:
        distilled = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(f"{path}: unreadable: {error}") from error
    for name, tensor in merge.items():
        found = distilled.get(name)
        if found is None or found.shape != tensor.shape or not bool(found.isfinite().all()):
            shape = "nothing" if found is None else list(found.shape)
            raise UnsupportedModelError(f"{path}: {name} should be {list(tensor.shape)}, found {shape}")
    return {name: distilled[name].float() for name in merge}


def load_gpt2_configuration(directory: Path) -> Gpt2Configuration:
    """Reads ``config.json`` of a store's ``general`` folder.

    Raises:
        StoreCorruptError: the file is missing or damaged.
    """
    return read_configuration(directory, Gpt2Configuration.from_dictionary)


def load_gpt2_tensors(directory: Path, configuration: Gpt2Configuration) -> dict[str, torch.Tensor]:
    """Reads the base model's weights (float32, transformers' names without a prefix) and checks their shapes.

    Raises:
        StoreCorruptError: the file is missing or damaged, or a shape contradicts the configuration.
    """
    return load_weights(directory, _expected_shapes(configuration))


def _expected_shapes(configuration: Gpt2Configuration) -> dict[str, tuple[int, ...]]:
    hidden, inner = configuration.hidden_size, configuration.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (configuration.vocab_size, hidden),
        "wpe.weight": (configuration.max_positions, hidden),
        "ln_f.weight": (hidden,),
        "ln_f.bias": (hidden,),
    }
    linears = {
        "attn.c_attn": (hidden, 3 * hidden),
        "attn.c_proj": (hidden, hidden),
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }
    for layer in range(configuration.num_layers):
        for name, (inputs, outputs) in linears.items():
            shapes[f"h.{layer}.{name}.weight"] = (inputs, outputs)
            shapes[f"h.{layer}.{name}.bias"] = (outputs,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{layer}.{name}.weight"] = shapes[f"h.{layer}.{name}.bias"] = (hidden,)
    return shapes
