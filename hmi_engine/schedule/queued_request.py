"""What the scheduler knows of a request."""

from __future__ import annotations

import enum
import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["QueuedRequest", "RequestState"]

Payload = TypeVar("Payload")


class RequestState(enum.Enum):
    """Where a request is; only the scheduler changes it."""

    NEW = "new"
    """Not submitted, or refused: it may be submitted."""
    QUEUED = "queued"
    RUNNING = "running"
    """In a batch that was formed and is not finished."""
    DONE = "done"
    CANCELLED = "cancelled"
    """While queued, or while running: then it stays in its batch, and nobody waits for its result."""
    EXPIRED = "expired"
    """Its deadline passed while it was queued."""


@dataclass(eq=False, slots=True)
class QueuedRequest(Generic[Payload]):
    """One sequence that waits to be computed. Two are equal only if they are the same object.

    Attributes:
        tenant: between whom service is shared.
        weights_key: the weights it runs through, such as a tenant's id and generation. Sequences of one key
            are one segment of a batch.
        num_tokens: what it costs, at least 1.
        adapter_bytes: what the weights of ``weights_key`` take in the arena.
        payload: the caller's own; the scheduler never looks at it.
        priority: inside its tenant, the highest is served first. It moves nothing between tenants.
        deadline: after this time of the scheduler's clock it is not worth while to begin; None for never.
        arrival: when it was submitted, on the scheduler's clock; NaN before.
        state: see :class:`RequestState`.
    """

    tenant: str
    weights_key: Hashable
    num_tokens: int
    adapter_bytes: int
    payload: Payload
    priority: int = 0
    deadline: float | None = None
    arrival: float = field(default=math.nan, init=False)
    state: RequestState = field(default=RequestState.NEW, init=False)

    def __post_init__(self) -> None:
        """Checks what was given.

        Raises:
            ValueError: a number is out of range.
        """
        of = f"a request of tenant {self.tenant!r}"
        if self.num_tokens < 1:
            raise ValueError(f"{of} has {self.num_tokens} tokens, must be at least 1")
        if self.adapter_bytes < 0:
            raise ValueError(f"{of} has weights of {self.adapter_bytes} bytes, must be at least 0")
        if self.deadline is not None and math.isnan(self.deadline):
            raise ValueError(f"{of} has the deadline NaN, must be a time or None")
