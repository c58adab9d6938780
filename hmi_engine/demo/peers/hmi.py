"""HMI itself behind the interface of its peers."""

from __future__ import annotations

from collections.abc import Sequence

from hmi_engine.demo.peers.interface import ServedTenant
from hmi_engine.engine import Engine
from hmi_engine.errors import UnknownTenantError
from hmi_engine.request import Request, Response

__all__ = ["HmiPeer"]


class HmiPeer:
    """An engine over a store that already holds the tenants."""

    def __init__(self, engine: Engine, *, name: str, description: str) -> None:
        """``engine`` is closed by :meth:`close`; its store stays the caller's."""
        self.name = name
        self.description = description
        self._engine = engine

    def prepare(self, tenants: Sequence[ServedTenant]) -> None:
        """Loads the tenants' adapters, as the other systems do.

        Raises:
            UnknownTenantError: the store lacks one.
        """
        missing = [tenant.name for tenant in tenants if tenant.name not in self._engine.store.tenants]
        if missing:
            raise UnknownTenantError(f"{missing[0]} is not in the engine's store; add it before measuring")
        self._engine.prefetch([tenant.name for tenant in tenants])

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """Answers one batch."""
        return self._engine.run(requests)

    def close(self) -> None:
        """Closes the engine."""
        self._engine.close()
