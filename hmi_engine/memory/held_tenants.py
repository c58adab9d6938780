"""Tenants that stay in memory while a batch uses them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from hmi_engine.errors import HmiError
from hmi_engine.memory.resident_tenant import ResidentTenant
from hmi_engine.memory.streams import Arrival

__all__ = ["HeldTenants"]


class HeldTenants(AbstractContextManager[list[ResidentTenant | HmiError]]):
    """Tenants that neither leave nor move until :meth:`release`, which any thread may call, once or more.

    Attributes:
        outcomes: the tenants, or why they cannot be served.
        arrivals: what to wait for before they are read: on a GPU, of those whose copies are under way.
    """

    def __init__(
        self,
        outcomes: list[ResidentTenant | HmiError],
        arrivals: list[Arrival],
        release: Callable[[], None],
    ) -> None:
        """Use :meth:`hmi_engine.memory.residency.AdapterResidency.holding`; ``release`` may come twice."""
        self.outcomes = outcomes
        self.arrivals = arrivals
        self._release: Callable[[], None] | None = release

    def release(self) -> None:
        """Lets them go; a second call does nothing."""
        release = self._release
        if release is None:
            return
        release()
        self._release = None

    def __enter__(self) -> list[ResidentTenant | HmiError]:
        """The outcomes."""
        return self.outcomes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets them go."""
        self.release()
