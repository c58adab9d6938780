"""What malloc does with the memory of a batch after the batch."""

from __future__ import annotations

import functools

from hmi_kernels.native import native, native_reason
from hmi_kernels.settings import chooses_own_malloc_thresholds, setting

__all__ = ["keep_freed_memory"]


@functools.cache
def keep_freed_memory() -> bool:
    """Has malloc keep up to 256 MiB of freed memory in each of its heaps, instead of returning it at once.

    The tensors of a batch are freed after it and allocated again for the next. What glibc gives back to the
    system in between is filled with zeros again, page by page: up to a third of the time of large batches. An
    engine on the CPU calls this when it opens; for all of the process, once. Returns whether it is so: not
    where ``HMI_KEEP_FREED_MEMORY=0``, where the environment sets these thresholds of glibc itself
    (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``), nor where malloc is another.
    """
    if native_reason or setting("HMI_KEEP_FREED_MEMORY") == "0" or chooses_own_malloc_thresholds():
        return False
    return native.keep_freed_memory()
