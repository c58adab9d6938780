"""Hidden states that no step changes, kept on disk as float16 and mapped into memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hmi_engine.knowledge.atomic import atomic_write, fsync_path, storage_error

__all__ = ["StateCache", "is_reserved", "reserve_file"]


def is_reserved(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether :func:`reserve_file` would open the file as it is, and not make it anew."""
    return path.is_file() and path.stat().st_size == _num_bytes(shape)


def _num_bytes(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * 2


def reserve_file(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """Opens a float16 file of this shape for writing, and makes it if it is missing or has another size.

    Raises:
        StoreFullError: the disk has no room for all of it. Writing through the mapping could not tell.
    """
    size = _num_bytes(shape)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() != size:
                os.truncate(path, 0)
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise storage_error(
            error, path, kept="Free some space, or give less disk to cached states (cache_bytes)"
        ) from error
    return np.memmap(path, dtype=np.float16, mode="r+", shape=shape)


class StateCache:
    """States of batches, computed when first asked for.

    What is returned has been rounded to float16 whether it was kept or not, so that nothing depends on what
    was found. Batches that have no room are computed each time.
    """

    def __init__(self, path: Path, batch_tokens: Sequence[int], width: int, max_bytes: int) -> None:
        """Opens the states kept at ``path`` in an earlier run.

        Args:
            path: of the file; its name must tell all that the states depend on.
            batch_tokens: number of tokens of each batch.
            width: elements of a token.
            max_bytes: for the file.

        Raises:
            StoreFullError: no room for the file.
        """
        ends = np.cumsum(np.asarray(batch_tokens, dtype=np.int64))
        self._num_kept = int(np.searchsorted(ends * width * 2, max_bytes, side="right"))
        self._starts = np.concatenate([[0], ends])
        self._done = np.zeros(self._num_kept, dtype=bool)
        self._path = path
        if self._num_kept:
            shape = int(ends[self._num_kept - 1]), width
            if not is_reserved(path, shape):
                self._forget_done()
            self._states = reserve_file(path, shape)
            self._load_done()

    @property
    def _done_path(self) -> Path:
        return self._path.with_suffix(".done")

    def _forget_done(self) -> None:
        """Before the file is made anew: no crash may leave a note of states that are not in it."""
        try:
            if self._done_path.exists():
                self._done_path.unlink()
                fsync_path(self._done_path.parent)
        except OSError as error:
            raise storage_error(error, self._done_path) from error

    def _load_done(self) -> None:
        try:
            found = np.fromfile(self._done_path, dtype=bool)
        except OSError:
            return
        if len(found) == self._num_kept:
            self._done[:] = found

    def get(self, number: int, compute: Callable[[], Tensor]) -> Tensor:
        """The states of a batch, float16 [T, width]; ``compute`` gives them in any float type."""
        rows = slice(int(self._starts[number]), int(self._starts[number + 1]))
        if number < self._num_kept and self._done[number]:
            return torch.from_numpy(np.array(self._states[rows]))
        states = compute().to(torch.float16).cpu()
        if number < self._num_kept:
            self._states[rows] = states.numpy()
            self._done[number] = True
        return states

    def sync(self) -> None:
        """Flushes the states, and then notes which are there: a crash leaves none noted that is not.

        Raises:
            StoreError: the disk refused.
        """
        if self._num_kept:
            self._states.flush()
            atomic_write(self._done_path, self._done.tofile)
