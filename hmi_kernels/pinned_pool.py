"""Page-locked host memory under a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hmi_kernels.copies import release_finished, wait_for_copies
from hmi_kernels.cuda import driver
from hmi_kernels.native import native

__all__ = ["PinnedPool"]


class PinnedPool:
    """Host memory that a GPU copies from at full speed, beside its other work, and that kernels can read.

    Page-locking takes milliseconds, so memory is kept for reuse. Sizes are rounded up to multiples of 4 KiB,
    above 64 KiB to eighths of a power of two: at most 12.5 % more than asked from 32 KiB on. A request fails
    only if it and what is in use exceed the budget together, whatever the history: memory kept for other
    sizes is given up for it. Where CUDA is missing the pool gives ordinary memory under the same rules.

    Thread-safe. Use it in a with-statement, or call :meth:`close`.
    """

    def __init__(self, budget_bytes: int) -> None:
        """Takes no memory yet. Raises ValueError on a negative budget."""
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes must not be negative, but is {budget_bytes}")
        make_pool = native.plain_pool if driver.reason() else driver.module().pinned_pool
        self._blocks: Any = make_pool(budget_bytes)
        self._registered: list[Tensor] = []

    def empty(self, shape: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor of the pool's memory, uninitialized, contiguous, aligned to 4 KiB.

        The memory goes back to the pool when no tensor uses it any more, and no copy that
        :func:`copy_batch_async` or read that :func:`start_reads` started.

        Raises PoolClosedError; PoolExhaustedError if it does not fit into the budget; CudaError if the
        machine has no more memory to page-lock; ValueError on a negative size.
        """
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        if any(size < 0 for size in sizes):
            raise ValueError(f"shape must not be negative, but is {list(sizes)}")
        num_bytes = math.prod(sizes) * dtype.itemsize
        release_finished()
        native.release_ended_reads()
        block = self._blocks.allocate(num_bytes)
        if num_bytes == 0:
            return torch.empty(sizes, dtype=dtype)
        return torch.frombuffer(block, dtype=dtype).view(sizes)

    def register(self, tensor: Tensor, *, read_only: bool = False) -> None:
        """Page-locks memory that exists, such as a file mapped into memory, until the pool is closed.

        Its bytes count as in use, and the pool keeps the tensor alive. ``read_only`` is for memory that this
        process may not write.

        Raises as :meth:`empty` does; ValueError unless the tensor is contiguous and in host memory, or if it
        is registered already.
        """
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise ValueError(f"tensor must be contiguous and in host memory, not on {tensor.device}")
        if tensor.nbytes > 0:
            self._blocks.enlist(tensor.data_ptr(), tensor.nbytes, read_only)
            self._registered.append(tensor)

    def close(self) -> None:
        """Frees what is not in use, now; tensors in use stay valid, and are freed when they are dropped.

        Waits for copies under way if memory was registered.
        """
        if self._registered:
            wait_for_copies()
        self._blocks.close()
        self._registered.clear()

    @property
    def bytes_in_use(self) -> int:
        """Bytes of living tensors, rounded up as the class says, and of registered memory."""
        return int(self._blocks.bytes_in_use)

    @property
    def bytes_reserved(self) -> int:
        """Bytes in use and bytes kept for reuse: never more than the budget."""
        return int(self._blocks.bytes_reserved)

    @property
    def budget_bytes(self) -> int:
        """The most that the pool may hold."""
        return int(self._blocks.budget_bytes)

    @property
    def is_pinned(self) -> bool:
        """Whether the memory is page-locked: whether CUDA can be used here."""
        return bool(self._blocks.is_pinned)

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return bool(self._blocks.is_closed)

    def __enter__(self) -> PinnedPool:
        """The pool itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def __del__(self) -> None:
        """Closes it if memory was registered, which must not outlive its registration."""
        if getattr(self, "_registered", None):
            self.close()
