"""Many files read at once, each straight into the tensor that wants it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from hmi_kernels.native import native, native_reason

__all__ = ["Outcome", "check_reads", "explain", "read_by_python", "read_files"]

Outcome = tuple[int, int, bool]
"""errno, bytes read, whether all floats are finite."""


def read_files(
    paths: Sequence[str | os.PathLike[str]],
    file_offsets: Sequence[int],
    destinations: Sequence[Tensor],
    *,
    num_threads: int = 8,
    require_finite: bool = False,
) -> list[OSError | EOFError | ValueError | None]:
    """Fills each tensor with the bytes of its file from an offset on; several files are read at a time.

    Nothing is copied on the way: the kernel writes into the tensor's memory, which may be page-locked. The
    interpreter's lock is not held. A read that is stuck holds this call up: see :func:`start_reads`.

    Args:
        paths: files.
        file_offsets: the first byte wanted of each.
        destinations: contiguous CPU tensors, one a file, that share no memory; as many bytes are read as each
            has.
        num_threads: most files read at a time. More than the cores there are pays where files come from a
            disk; what the operating system has in memory is read no faster by more threads than cores.
        require_finite: look at what was read, as float32, while it is in the processor's cache.

    Returns:
        For each file None, or why it was not read: OSError (FileNotFoundError, ...), EOFError where the file
        ends early, ValueError where ``require_finite`` found NaN or infinity. What its tensor holds is then
        undefined; the others are not concerned.

    Raises:
        ValueError: unequal lengths, an offset below 0, a tensor that is not contiguous.
        TypeError: a tensor that is not on the CPU, or, with ``require_finite``, not float32.
    """
    check_reads(paths, file_offsets, destinations, num_threads, require_finite)
    names = [os.fspath(path) for path in paths]
    sizes = [tensor.nbytes for tensor in destinations]
    if native_reason:
        outcomes = [
            read_by_python(name, offset, tensor, require_finite)
            for name, offset, tensor in zip(names, file_offsets, destinations, strict=True)
        ]
    else:
        addresses = [tensor.data_ptr() for tensor in destinations]
        outcomes = native.read_files(
            [os.fsencode(name) for name in names],
            list(file_offsets),
            sizes,
            addresses,
            require_finite,
            num_threads,
        )
    return [explain(*each) for each in zip(names, sizes, outcomes, strict=True)]


def check_reads(
    paths: Sequence[str | os.PathLike[str]],
    file_offsets: Sequence[int],
    destinations: Sequence[Tensor],
    num_threads: int,
    require_finite: bool,
) -> None:
    """Raises ValueError and TypeError as :func:`read_files` says."""
    if not len(paths) == len(file_offsets) == len(destinations):
        raise ValueError(
            f"{len(paths)} paths, {len(file_offsets)} file_offsets and {len(destinations)} destinations: "
            "each file needs one of each"
        )
    if num_threads < 1:
        raise ValueError(f"num_threads must be positive, not {num_threads}")
    if any(offset < 0 for offset in file_offsets):
        raise ValueError("file_offsets must not be negative")
    for tensor in destinations:
        if tensor.device.type != "cpu" or (require_finite and tensor.dtype != torch.float32):
            raise TypeError(
                f"destinations must be {'float32 ' * require_finite}tensors on the CPU, not {tensor.dtype} "
                f"on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError("destinations must be contiguous")


def explain(name: str, size: int, outcome: Outcome) -> OSError | EOFError | ValueError | None:
    """Why a file of which ``size`` bytes were wanted was not read; None if it was."""
    number, bytes_read, is_finite = outcome
    if number:
        return OSError(number, os.strerror(number), name)
    if bytes_read < size:
        return EOFError(f"{name}: holds {bytes_read} of {size} bytes; it is cut short")
    if not is_finite:
        return ValueError(f"{name}: holds NaN or infinity")
    return None


def read_by_python(name: str, offset: int, tensor: Tensor, require_finite: bool) -> Outcome:
    """One file, where the compiled module is missing."""
    view = tensor.detach().view(-1).view(torch.uint8).numpy().data
    try:
        with Path(name).open("rb", buffering=0) as file:
            file.seek(offset)
            bytes_read = 0
            while bytes_read < len(view) and (count := file.readinto(view[bytes_read:])):
                bytes_read += count
    except OSError as error:
        return error.errno or 5, 0, True
    is_whole = bytes_read == len(view)
    return 0, bytes_read, not (require_finite and is_whole) or bool(torch.isfinite(tensor).all())
