"""Tensors that are views of a file: the system reads a page when it is first used, and processes share it."""

import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.tensor_file import TensorEntry, TensorHeader

__all__ = ["DTYPES", "map_file", "map_tensors", "view_tensor"]

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "I8": torch.int8,
    "U8": torch.uint8,
}
"""Element types by their names in a safetensors header."""

_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python's module from 3.13 on


def map_tensors(path: Path, header: TensorHeader) -> dict[str, Tensor]:
    """Return the tensors of a file as private views of it, by name.

    They stay good as long as they live, even when the file is removed. Raises :class:`StoreCorruptError`
    where the file cannot be mapped.
    """
    mapping = map_file(path, header.data_start + header.data_bytes)
    return {entry.name: _view_entry(mapping, header.data_start, entry) for entry in header.entries}


def map_file(path: Path, num_bytes: int) -> mmap.mmap:
    """Map the first ``num_bytes`` of a file privately; raises :class:`StoreCorruptError` as above."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Private and writable, because torch warns of read-only buffers; nothing is ever written.
            # Without MAP_NORESERVE such a mapping would count as if all of it were written.
            return mmap.mmap(
                descriptor,
                num_bytes,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        raise StoreCorruptError(f"{path}: cannot be mapped: {error}") from error


def view_tensor(mapping: mmap.mmap, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Return the tensor of ``shape`` whose bytes begin at ``offset`` of the mapping."""
    count = torch.Size(shape).numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset).view(shape)


def _view_entry(mapping: mmap.mmap, data_start: int, entry: TensorEntry) -> Tensor:
    return view_tensor(mapping, data_start + entry.start, DTYPES[entry.dtype], entry.shape)
