"""The layouts of tenants' files that were read before, so that a tenant that comes back needs one read."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from hmi_engine.knowledge.tenant_file import TenantLayout
from hmi_engine.memory.parameter_format import ConvertedLayout

__all__ = ["LayoutCache"]

# What Python's objects take, about, as tests/memory/test_layout_cache.py measures.
_DIGEST_BYTES = 500
_LAYOUT_BYTES = 2500
_BLOCK_BYTES = 900
_TENSOR_BYTES = 500
_COPY_BYTES = 300


class LayoutCache:
    """Layouts by content digest, within a budget; those not asked for the longest go first.

    Equal layouts are held once, and tenants of one kind, shape and head are equal. Not thread-safe.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0
        self._keys: OrderedDict[str, bytes] = OrderedDict()
        self._layouts: dict[bytes, TenantLayout] = {}
        self._uses: dict[bytes, int] = {}

    def __len__(self) -> int:
        """How many digests are known."""
        return len(self._keys)

    def get(self, sha256: str) -> TenantLayout | None:
        """The layout of the file with this digest, if it is known."""
        key = self._keys.get(sha256)
        if key is None:
            return None
        self._keys.move_to_end(sha256)
        return self._layouts[key]

    def put(self, sha256: str, layout: TenantLayout) -> TenantLayout:
        """Remembers a layout; returns the equal one that is held."""
        if sha256 in self._keys:
            return self._layouts[self._keys[sha256]]
        key = hashlib.blake2b(repr(layout).encode(), digest_size=16).digest()
        self._keys[sha256] = key
        self.num_bytes += _DIGEST_BYTES
        if key not in self._layouts:
            self._layouts[key] = layout
            self._uses[key] = 0
            self.num_bytes += _size(layout)
        self._uses[key] += 1
        held = self._layouts[key]
        while self.num_bytes > self._max_bytes and self._keys:
            self._forget_oldest()
        return held

    def _forget_oldest(self) -> None:
        _, key = self._keys.popitem(last=False)
        self.num_bytes -= _DIGEST_BYTES
        self._uses[key] -= 1
        if not self._uses[key]:
            self.num_bytes -= _size(self._layouts.pop(key))
            del self._uses[key]


def _size(layout: TenantLayout) -> int:
    copies = len(layout.copies) if isinstance(layout, ConvertedLayout) else 0
    return (
        _LAYOUT_BYTES
        + _COPY_BYTES * copies
        + _BLOCK_BYTES * len(layout.blocks)
        + _TENSOR_BYTES * len(layout.head.tensors)
    )
