"""The ``general`` folder of a store: a base model as transformers keeps it, its tokenizer, and the merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hmi_engine.errors import StoreCorruptError, UnsupportedModelError

__all__ = [
    "CONFIGURATION_FILE",
    "GENERATION_FILE",
    "MERGE_FILE",
    "MERGE_LAYER_NORM_EPS",
    "WEIGHTS_FILE",
    "Checkpoint",
    "check_fields",
    "load_merge",
    "load_weights",
    "loading_error",
    "read_checkpoint",
    "read_configuration",
    "undistilled_merge",
]

WEIGHTS_FILE = "model.safetensors"
MERGE_FILE = "merge.safetensors"
CONFIGURATION_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
MERGE_LAYER_NORM_EPS = 1e-5

Sizes = TypeVar("Sizes")


@dataclass(frozen=True)
class Checkpoint(Generic[Sizes]):
    """A model as transformers loaded it.

    Attributes:
        sizes: what its computation depends on.
        config: its ``config.json``.
        tokenizer: a fast one.
        model: of the class that was asked for, float32.
        missing: names of weights that the files lack.
    """

    sizes: Sizes
    config: Mapping[str, Any]
    tokenizer: Any
    model: Any
    missing: tuple[str, ...]

    def write(
        self, directory: Path, tensors: Mapping[str, torch.Tensor], merge: Mapping[str, torch.Tensor]
    ) -> None:
        """Writes the folder, with these of the model's weights and this merge.

        Of what transformers knows of generating, the tokens that end a text are kept.
        """
        directory.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.config, indent=2, sort_keys=True, default=str)
        (directory / CONFIGURATION_FILE).write_text(text)
        generation = getattr(self.model, "generation_config", None)
        if generation is not None:
            ends = json.dumps({"eos_token_id": generation.eos_token_id})
            (directory / GENERATION_FILE).write_text(ends)
        self.tokenizer.save_pretrained(directory)
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, directory / WEIGHTS_FILE)
        save_file(dict(merge), directory / MERGE_FILE)


def read_checkpoint(
    source: str,
    class_name: str,
    architecture: str,
    sizes_of: Callable[[dict[str, Any], str], Sizes],
    *,
    may_lack: str | None = None,
) -> Checkpoint[Sizes]:
    """Loads a folder or hub id through transformers.

    A hub id that is not in the local cache is downloaded by transformers, because the caller named it.

    Args:
        source: the folder or id.
        class_name: of the class of transformers.
        architecture: its name for people.
        sizes_of: reads a ``config.json``, and refuses what HMI does not compute; its second argument says
            where that is from.
        may_lack: what the names of weights begin with that may be missing; None: nothing may be.

    Raises:
        UnsupportedModelError: the folder or id holds no readable model, or one of another architecture, or
            its tokenizer has tokens that the model does not know.
    """
    import transformers
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source).to_dict()
        sizes = sizes_of(config, source)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, use_fast=True)
        model, loading = getattr(transformers, class_name).from_pretrained(
            source, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (UnsupportedModelError, MemoryError):
        raise
    except Exception as error:  # of what is wrong in a file, each library has errors of its own
        raise loading_error(source, f"a {architecture}-architecture model", error) from error
    if not tokenizer.is_fast:
        raise UnsupportedModelError(
            f"{source}: has no fast tokenizer (tokenizer.json); convert it with transformers"
        )
    missing = tuple(loading["missing_keys"])
    needed = [name for name in missing if may_lack is None or not name.startswith(may_lack)]
    if needed:
        raise UnsupportedModelError(
            f"{source}: the checkpoint lacks {needed[0]} and {len(needed) - 1} more weights"
        )
    _check_token_ids(tokenizer, model.get_input_embeddings().num_embeddings, source)
    return Checkpoint(sizes, config, tokenizer, model, missing)


def loading_error(source: str, wanted: str, error: Exception) -> UnsupportedModelError:
    """The error to raise where transformers failed to load ``source`` as what was ``wanted``."""
    reason = next(iter(str(error).strip().splitlines()), "")
    if not isinstance(error, OSError | ValueError):  # those of others say little by themselves
        reason = f"{type(error).__name__}: {reason}"
    return UnsupportedModelError(
        f"{source}: cannot be loaded as {wanted}: {reason}; is the download complete, and does "
        "AutoModel.from_pretrained load it?"
    )


def _check_token_ids(tokenizer: Any, vocab_size: int, source: str) -> None:
    """Refuses a tokenizer that gives ids at or above ``vocab_size``, the rows of the model's embeddings."""
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1], default=("", -1))
    if largest >= vocab_size:
        raise UnsupportedModelError(
            f"{source}: the tokenizer has the token {token!r:.80} with id {largest}, but the model knows "
            f"{vocab_size} tokens: resize its embeddings with "
            "model.resize_token_embeddings(len(tokenizer)) and save it again, or remove the tokens that were "
            "added"
        )


def check_fields(
    config: Mapping[str, Any],
    expected: Mapping[str, tuple[Any, ...]],
    source: str,
    *,
    served: str,
    examples: str,
) -> None:
    """Raises :class:`UnsupportedModelError` where a field of a ``config.json`` is none of the ``expected``.

    The message names what HMI has ``served`` instead, and ``examples`` of it.
    """
    for field, allowed in expected.items():
        if config.get(field) not in allowed:
            raise UnsupportedModelError(
                f"{source}: {field} is {config.get(field)!r}; HMI serves {served} with {field} "
                f"{allowed[0]!r} ({examples}); choose such a model as --general"
            )


def read_configuration(directory: Path, sizes_of: Callable[[dict[str, Any], str], Sizes]) -> Sizes:
    """Reads ``config.json`` of a store's ``general`` folder, as ``sizes_of`` understands it.

    Raises:
        StoreCorruptError: the file is missing or damaged.
    """
    path = directory / CONFIGURATION_FILE
    try:
        return sizes_of(json.loads(path.read_text()), str(path))
    except (OSError, ValueError, KeyError) as error:
        raise StoreCorruptError(f"{path}: unreadable configuration of the base model: {error}") from error


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
