"""Reading folders that come from outside: JSON settings and safetensors, with every doubt an error.

A file is read whole before it is looked at, so what was checked is what is used. Symbolic links are followed
(the Hugging Face cache is made of them) but must end at a regular file: nothing here waits for a pipe or a
device. Names inside files never become paths. Pickle is never read.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from safetensors import SafetensorError, deserialize

from hmi_engine.errors import InvalidAdapterError
from hmi_engine.printable import printable

__all__ = ["CONFIG_FILE", "FolderFormat", "TensorFile", "detect_format", "read_object", "read_tensors"]

CONFIG_FILE = "adapter_config.json"
FolderFormat = Literal["peft", "adapterhub"]
_FUSION_FILE = "adapter_fusion_config.json"

MAX_SETTINGS_BYTES = 16 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_TENSOR_FILE_BYTES = 2 << 30

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADER_LENGTH_BYTES = 8


class TensorFile:
    """The tensors of one safetensors file. What nobody has taken in the end has no meaning for HMI."""

    def __init__(
        self, path: Path, tensors: Mapping[str, Mapping[str, Any]], metadata: Mapping[str, str]
    ) -> None:
        self.path = path
        self.metadata = metadata
        self._tensors = tensors
        self._untaken = dict.fromkeys(sorted(tensors))

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors in the file."""
        return tuple(self._tensors)

    @property
    def untaken(self) -> tuple[str, ...]:
        """Names of the tensors that were not taken yet."""
        return tuple(self._untaken)

    def __contains__(self, name: str) -> bool:
        """Whether the file holds a tensor of this name."""
        return name in self._tensors

    def take(self, name: str) -> torch.Tensor:
        """A tensor of a float type, as stored.

        Raises:
            InvalidAdapterError: it is missing, or of another type.
        """
        if name not in self._tensors:
            raise InvalidAdapterError(
                f"{self.path}: no tensor {name!r:.300}; the file is not complete, save the adapter again"
            )
        self._untaken.pop(name, None)
        entry = self._tensors[name]
        dtype = _DTYPES.get(str(entry["dtype"]).upper().removeprefix("TORCH."))
        if dtype is None:
            raise InvalidAdapterError(
                f"{self.path}: {name}: dtype is {entry['dtype']}, expected {', '.join(_DTYPES)}; "
                "save the adapter in one of these"
            )
        shape = tuple(entry["shape"])
        if math.prod(shape) == 0:
            raise InvalidAdapterError(f"{self.path}: {name} has shape {list(shape)}: it holds nothing")
        return torch.frombuffer(entry["data"], dtype=dtype).reshape(shape)

    def ignore(self, name: str) -> None:
        """Marks a tensor as one that changes nothing."""
        self._untaken.pop(name, None)


def detect_format(directory: Path) -> FolderFormat:
    """Which library saved a folder: only PEFT writes ``peft_type`` into ``adapter_config.json``.

    Raises:
        InvalidAdapterError: no folder, or its ``adapter_config.json`` is neither's.
    """
    if os.path.lexists(directory / _FUSION_FILE) and not os.path.lexists(directory / CONFIG_FILE):
        raise InvalidAdapterError(
            f"{directory}: AdapterFusion is not supported: it attends over several adapters at each layer; "
            "import one of its adapters, or train one on their task"
        )
    fields = read_object(directory / CONFIG_FILE)
    if "peft_type" in fields:
        return "peft"
    if "config" in fields:
        return "adapterhub"
    raise InvalidAdapterError(
        f"{directory / CONFIG_FILE}: has neither peft_type (as PEFT writes) nor config (as AdapterHub's "
        "adapters library writes); give a folder that one of them saved"
    )


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        InvalidAdapterError: the file is missing, no regular file, too large, or no JSON object of plain text
            and finite numbers.
    """
    content = _read_file(path, MAX_SETTINGS_BYTES)
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")  # half a surrogate, 1e999
    except (ValueError, RecursionError) as error:
        raise InvalidAdapterError(f"{path}: unreadable: {_told(error)}") from error
    if not isinstance(value, dict):
        raise InvalidAdapterError(f"{path}: holds a {type(value).__name__}, expected an object of settings")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def read_tensors(path: Path, *, pickled_name: str, way_out: str) -> TensorFile:
    """Reads a safetensors file.

    Args:
        path: the file.
        pickled_name: the file that the same library writes as a pickle.
        way_out: how to save such a folder again as safetensors.

    Raises:
        InvalidAdapterError: the file is missing or damaged, or there is only a pickle.
    """
    if not os.path.lexists(path) and os.path.lexists(path.with_name(pickled_name)):
        raise InvalidAdapterError(
            f"{path.parent}: no {path.name}, only {pickled_name}, a pickle, which is never read; {way_out}"
        )
    content = _read_file(path, MAX_TENSOR_FILE_BYTES)
    header_bytes = int.from_bytes(content[:_HEADER_LENGTH_BYTES], "little")
    if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, len(content) - _HEADER_LENGTH_BYTES):
        raise InvalidAdapterError(
            f"{path}: unreadable: a header of {header_bytes} bytes in a file of {len(content)} (most: "
            f"{MAX_HEADER_BYTES}); it is cut short or no safetensors file"
        )
    try:
        tensors: dict[str, dict[str, Any]] = dict(deserialize(content))  # type: ignore[no-untyped-call]
        header = json.loads(content[_HEADER_LENGTH_BYTES:][:header_bytes])
    except (SafetensorError, ValueError, RecursionError, OverflowError) as error:
        raise InvalidAdapterError(f"{path}: unreadable: {_told(error)}") from error
    for name in tensors:
        if not name.isprintable():
            raise InvalidAdapterError(f"{path}: the name of tensor {name!r:.80} is no text")
    return TensorFile(path, tensors, header.get("__metadata__") or {})


def _told(error: Exception) -> str:
    """What a library says of the file, which it may quote: short, and on one line."""
    return printable(str(error)[:200].replace("\n", " "))


def _read_file(path: Path, limit: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            state = os.fstat(descriptor)
            if not stat.S_ISREG(state.st_mode):
                raise InvalidAdapterError(f"{path}: no regular file")
            if state.st_size > limit:
                raise InvalidAdapterError(
                    f"{path}: {state.st_size} bytes; a file of an adapter has at most {limit}"
                )
            return file.read(limit + 1)[: state.st_size]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InvalidAdapterError(f"{path.parent}: no {path.name}; {_what_is_there(path.parent)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidAdapterError(f"{path}: cannot be read: {reason}") from error


def _what_is_there(folder: Path) -> str:
    if not os.path.lexists(folder):
        return "the folder does not exist"
    if not folder.is_dir():
        return "this is no folder"
    return "give a folder that PEFT or AdapterHub's adapters library saved"
