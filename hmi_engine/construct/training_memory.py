"""Says which setting to change where a training runs out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.errors import TrainingMemoryError

__all__ = ["is_memory_error", "memory_advice"]

_CPU_ALLOCATOR = "DefaultCPUAllocator"


def is_memory_error(error: Exception) -> bool:
    """Whether an allocator, of Python or of torch, had no memory to give."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)


@contextmanager
def memory_advice(settings: TrainingSettings, stage: str) -> Iterator[None]:
    """Makes an allocator's error in the block a :class:`TrainingMemoryError` that names the settings."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory_error(error):
            raise
        raise TrainingMemoryError(
            f"out of memory at {stage} with batch_size={settings.batch_size} and texts of at most "
            f"{settings.max_tokens} tokens; lower --batch-size or --max-tokens, or give fewer examples"
        ) from error
