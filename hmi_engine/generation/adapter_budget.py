"""Which adapters a decoder's steps need beside each other, and whether one more would find room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.memory.tenant_reader import Digest, digest_of

__all__ = ["AdapterBudget"]


class AdapterBudget:
    """The adapters of all texts under way, which each step needs together; a tenant counts once."""

    def __init__(self, bytes_of: Callable[[TenantInfo], int], most_bytes: Callable[[], int]) -> None:
        """Of nobody yet; both are asked anew, as tenants may be pinned or unpinned meanwhile.

        All may take ``most_bytes`` together, a tenant ``bytes_of``: nothing if it has its own.
        """
        self._bytes_of, self._most_bytes = bytes_of, most_bytes
        self._users: Counter[Digest] = Counter()
        self._tenants: dict[Digest, TenantInfo] = {}

    def has_room_for(self, tenant: TenantInfo) -> bool:
        """Whether a tenant's adapter fits beside the others; one that is alone has all there is."""
        if not self._users or digest_of(tenant) in self._users:
            return True
        needed = self._bytes_of(tenant)
        return not needed or needed + sum(map(self._bytes_of, self._tenants.values())) <= self._most_bytes()

    def add(self, tenant: TenantInfo) -> None:
        """One more text of a tenant is under way."""
        digest = digest_of(tenant)
        self._users[digest] += 1
        self._tenants.setdefault(digest, tenant)

    def remove(self, tenant: TenantInfo) -> None:
        """One text less."""
        digest = digest_of(tenant)
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest], self._tenants[digest]
