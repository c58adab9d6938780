"""Reads BERT-architecture checkpoints through transformers; keeps them in a store's ``general`` folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hmi_engine.errors import StoreCorruptError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "BertConfiguration",
    "import_bert",
    "load_bert_tensors",
    "load_configuration",
    "load_merge",
    "load_weights",
    "undistilled_merge",
]

WEIGHTS_FILE = "model.safetensors"
MERGE_FILE = "merge.safetensors"
CONFIGURATION_FILE = "config.json"
MERGE_LAYER_NORM_EPS = 1e-5


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
        for field, allowed in expected.items():
            if config.get(field) not in allowed:
                raise UnsupportedModelError(
                    f"{source}: {field} is {config.get(field)!r}; HMI serves encoders of BERT's architecture "
                    f"with {field} {allowed[0]!r} (BERT, MiniLM); choose such a model as --general"
                )
        return cls(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_heads=config["num_attention_heads"],
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
    from transformers import AutoConfig, AutoTokenizer, BertModel
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source)
        configuration = _check_configuration(config, source)
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=True)
        model, loading = cast(
            "tuple[BertModel, dict[str, list[str]]]",
            BertModel.from_pretrained(
                source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            ),
        )
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(
            f"{source}: cannot be loaded as a BERT-architecture model: {reason}"
        ) from error
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{source}: has no fast tokenizer (tokenizer.json); convert it with transformers"
        )
    missing = [name for name in loading["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise UnsupportedModelError(
            f"{source}: the checkpoint lacks {missing[0]} and {len(missing) - 1} more weights"
        )
    has_pooler = not loading["missing_keys"]

    directory.mkdir(parents=True, exist_ok=True)
    (directory / CONFIGURATION_FILE).write_text(
        json.dumps(config.to_dict(), indent=2, sort_keys=True, default=str)
    )
    tokenizer.save_pretrained(directory)
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not name.endswith("position_ids") and (has_pooler or not name.startswith("pooler."))
    }
    save_file(tensors, directory / WEIGHTS_FILE)
    merge = undistilled_merge(tensors["embeddings.position_embeddings.weight"])
    save_file(merge, directory / MERGE_FILE)
    mask, unknown = tokenizer.mask_token_id, tokenizer.unk_token_id
    return configuration, unknown if mask is None else mask


def _check_configuration(config: PretrainedConfig, source: str) -> BertConfiguration:
    configuration = BertConfiguration.from_dictionary(config.to_dict(), source)
    if configuration.hidden_size % configuration.num_heads:
        raise UnsupportedModelError(
            f"{source}: hidden_size {configuration.hidden_size} is no multiple of its "
            f"{configuration.num_heads} heads"
        )
    return configuration


def load_configuration(directory: Path) -> BertConfiguration:
    """Reads ``config.json`` of a store's ``general`` folder.

    Raises:
        StoreCorruptError: the file is missing or damaged.
    """
    path = directory / CONFIGURATION_FILE
    try:
        return BertConfiguration.from_dictionary(json.loads(path.read_text()), str(path))
    except (OSError, ValueError, KeyError) as error:
        raise StoreCorruptError(f"{path}: unreadable configuration of the base model: {error}") from error


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


def load_weights(directory: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Reads a base model's weights; those named in ``expected`` must have these shapes.

    Raises:
        StoreCorruptError: the file is missing or damaged, or a shape is another.
    """
    path = directory / WEIGHTS_FILE
    tensors = _load(path)
    for name, shape in expected.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise StoreCorruptError(f"{path}: {name} should be {shape}, found {found}")
    return tensors


def undistilled_merge(positions: torch.Tensor) -> dict[str, torch.Tensor]:
    """The merge of a base whose position table is ``positions`` [P, H]: a LayerNorm that only normalizes."""
    return {
        "position_embeddings": positions.clone(),
        "layer_norm.weight": torch.ones(positions.shape[1]),
        "layer_norm.bias": torch.zeros(positions.shape[1]),
    }


def load_merge(directory: Path) -> dict[str, torch.Tensor]:
    """Reads the merge's ``position_embeddings`` [P, H] and ``layer_norm.weight``/``bias`` [H], float32.

    Raises:
        StoreCorruptError: the file is missing or damaged.
    """
    return _load(directory / MERGE_FILE)


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StoreCorruptError(f"{path}: unreadable weights: {error}") from error
