"""Reads BERT-architecture checkpoints through transformers; keeps them in a store's ``general`` folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hmi_engine.errors import UnsupportedModelError
from hmi_engine.models.general_folder import (
    check_fields,
    load_weights,
    read_checkpoint,
    read_configuration,
    undistilled_merge,
)

__all__ = ["BertConfiguration", "import_bert", "load_bert_configuration", "load_bert_tensors"]


@dataclass(frozen=True)
class BertConfiguration:
    """The sizes of a BERT-architecture encoder that its computation depends on."""

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    layer_norm_eps: float

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def from_dictionary(cls, config: dict[str, Any], source: str) -> BertConfiguration:
        """Reads the fields of a Hugging Face ``config.json``.

        Raises:
            UnsupportedModelError: another architecture, or a variant of BERT that HMI does not compute.
        """
        expected: dict[str, tuple[Any, ...]] = {
            "model_type": ("bert",),
            "hidden_act": ("gelu",),
            "position_embedding_type": ("absolute", None),
            "is_decoder": (False, None),
        }
        check_fields(
            config, expected, source, served="encoders of BERT's architecture", examples="BERT, MiniLM"
        )
        hidden_size, num_heads = config["hidden_size"], config["num_attention_heads"]
        if hidden_size % num_heads:
            raise UnsupportedModelError(
                f"{source}: hidden_size {hidden_size} is no multiple of its {num_heads} heads"
            )
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=hidden_size,
            num_heads=num_heads,
            intermediate_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            layer_norm_eps=config["layer_norm_eps"],
        )


def import_bert(source: str, directory: Path) -> tuple[BertConfiguration, int | None]:
    """Copies a base model and its tokenizer into ``directory``, in transformers' format.

    ``source`` is a folder or a hub id; a hub id that is not in the local cache is downloaded by transformers,
    because the caller named it. The merge starts undistilled: the base's own position table, LayerNorm with
    weight 1 and bias 0.

    Returns its sizes, and the id of the token that can stand for an unknown one: the tokenizer's mask token,
    or else its unknown token; None if it has neither.

    Raises:
        UnsupportedModelError: the folder or id holds no readable model, or one of another architecture.
    """
    checkpoint = read_checkpoint(
        source, "BertModel", "BERT", BertConfiguration.from_dictionary, may_lack="pooler."
    )
    tensors = {
        name: tensor
        for name, tensor in checkpoint.model.state_dict().items()
        if not name.endswith("position_ids") and not (checkpoint.missing and name.startswith("pooler."))
    }
    merge = undistilled_merge(tensors["embeddings.position_embeddings.weight"])
    checkpoint.write(directory, tensors, merge)
    mask, unknown = checkpoint.tokenizer.mask_token_id, checkpoint.tokenizer.unk_token_id
    return checkpoint.sizes, unknown if mask is None else mask


def load_bert_configuration(directory: Path) -> BertConfiguration:
    """Reads ``config.json`` of a store's ``general`` folder.

    Raises:
        StoreCorruptError: the file is missing or damaged.
    """
    return read_configuration(directory, BertConfiguration.from_dictionary)


def load_bert_tensors(directory: Path, configuration: BertConfiguration) -> dict[str, torch.Tensor]:
    """Reads the base model's weights (float32, transformers' names without a prefix) and checks their shapes.

    Raises:
        StoreCorruptError: the file is missing or damaged, or a shape contradicts the configuration.
    """
    sizes = dataclasses.asdict(configuration)
    expected = {
        "embeddings.word_embeddings.weight": (sizes["vocab_size"], sizes["hidden_size"]),
        "embeddings.position_embeddings.weight": (sizes["max_positions"], sizes["hidden_size"]),
    }
    for layer in range(configuration.num_layers):
        name = f"encoder.layer.{layer}.intermediate.dense.weight"
        expected[name] = (sizes["intermediate_size"], sizes["hidden_size"])
    return load_weights(directory, expected)
