"""Host memory that several engines of one process share."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping

from hmi_engine.errors import InsufficientMemoryError
from hmi_engine.knowledge.sizes import format_bytes, parse_bytes

__all__ = ["MemoryBudget"]


class MemoryBudget:
    """Host memory for the engines of a process, such as one of encoders and one of decoders.

    An engine that is opened with ``memory=`` reserves what its own budgets allow it to take, and gives it
    back when it is closed; one that would not fit beside the others is not opened. Thread-safe.
    """

    def __init__(self, total: int | str) -> None:
        """Nothing is reserved yet.

        Args:
            total: in bytes or as ``"6GiB"``.

        Raises:
            InvalidSizeError: that is no size.
        """
        self.total_bytes = parse_bytes(total)
        self._reserved: dict[Hashable, int] = {}
        self._lock = threading.Lock()

    @property
    def reserved_bytes(self) -> int:
        """What open engines have reserved."""
        with self._lock:
            return sum(self._reserved.values())

    @property
    def available_bytes(self) -> int:
        """What is left for others."""
        return self.total_bytes - self.reserved_bytes

    def reserve(self, owner: Hashable, parts: Mapping[str, int]) -> None:
        """Reserves the sum of ``parts``, bytes by the name of the option that asks for them.

        Raises:
            InsufficientMemoryError: less than that is left; nothing is reserved.
            ValueError: ``owner`` has reserved before, and not released.
        """
        wanted = sum(parts.values())
        with self._lock:
            if owner in self._reserved:
                raise ValueError("this owner has a reservation already; release it first")
            available = self.total_bytes - sum(self._reserved.values())
            if wanted > available:
                listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items() if size)
                raise InsufficientMemoryError(
                    f"the engine may take {format_bytes(wanted)} of host memory ({listed}), but "
                    f"{format_bytes(max(0, available))} of the {format_bytes(self.total_bytes)} that the "
                    "process's engines share are left: make an option smaller, or the budget larger"
                )
            self._reserved[owner] = wanted

    def release(self, owner: Hashable) -> None:
        """Gives back what ``owner`` reserved; does nothing if that is nothing."""
        with self._lock:
            self._reserved.pop(owner, None)
