"""A batch while it is formed: what it holds, and what still fits."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from hmi_engine.schedule.queued_request import QueuedRequest

__all__ = ["Obstacle", "OpenBatch"]

Payload = TypeVar("Payload")


class Obstacle(enum.Enum):
    """Why a request cannot join a batch."""

    COLD = "cold"
    """Its weights are not in memory, and the batch brings as many as it may already."""
    SIZE = "size"
    """Its tokens, or its weights beside those of the others, are too many."""


class OpenBatch(Generic[Payload]):
    """Requests by the weights they run through, under budgets of tokens, of bytes and of bytes to fetch."""

    def __init__(
        self,
        *,
        max_tokens: int,
        max_adapter_bytes: int,
        is_resident: Callable[[Hashable], bool] | None,
        max_cold_bytes: int | None,
    ) -> None:
        """Empty.

        Args:
            max_tokens: most tokens, unless a single request has more.
            max_adapter_bytes: most bytes of different weights together, unless a single request needs more.
            is_resident: whether weights are in memory, or will be when the batch runs; None if all are.
            max_cold_bytes: most bytes of weights that are not; None for no limit.
        """
        self._max_tokens = max_tokens
        self._max_adapter_bytes = max_adapter_bytes
        self._is_resident = is_resident
        self._max_cold_bytes = max_cold_bytes
        self._segments: dict[Hashable, list[QueuedRequest[Payload]]] = {}
        self._residency: dict[Hashable, bool] = {}  # asked once, so that a batch is formed of one state
        self._tokens = self._adapter_bytes = self._cold_bytes = 0

    def __bool__(self) -> bool:
        """Whether it holds anything."""
        return bool(self._segments)

    @property
    def is_full(self) -> bool:
        """Whether not even one more token fits."""
        return bool(self._segments) and self._tokens >= self._max_tokens

    def obstacle(self, request: QueuedRequest[Payload], *, mind_cold: bool) -> Obstacle | None:
        """What keeps ``request`` out; None if it fits. No size keeps one out of an empty batch."""
        is_new = request.weights_key not in self._segments
        new_bytes = request.adapter_bytes if is_new else 0
        too_many_cold = (
            self._max_cold_bytes is not None and self._cold_bytes + new_bytes > self._max_cold_bytes
        )
        if mind_cold and is_new and too_many_cold and self._is_cold(request.weights_key):
            return Obstacle.COLD
        too_many_tokens = self._tokens + request.num_tokens > self._max_tokens
        if self._segments and (too_many_tokens or self._adapter_bytes + new_bytes > self._max_adapter_bytes):
            return Obstacle.SIZE
        return None

    def add(self, request: QueuedRequest[Payload]) -> None:
        """Adds ``request``, whatever stands in its way."""
        if request.weights_key not in self._segments:
            self._adapter_bytes += request.adapter_bytes
            self._cold_bytes += request.adapter_bytes if self._is_cold(request.weights_key) else 0
        self._segments.setdefault(request.weights_key, []).append(request)
        self._tokens += request.num_tokens

    def requests(self) -> list[QueuedRequest[Payload]]:
        """All, those of one ``weights_key`` together, in the order in which the first of each came."""
        return [request for segment in self._segments.values() for request in segment]

    def _is_cold(self, key: Hashable) -> bool:
        if self._is_resident is None:
            return False
        if key not in self._residency:
            self._residency[key] = self._is_resident(key)
        return not self._residency[key]
