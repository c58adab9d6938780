"""The blocks of the paged cache: who holds which, and which hold what a new sequence begins with."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

__all__ = ["BlockPool", "PrefixKeys"]

_DIGEST_BYTES = 16


class PrefixKeys:
    """The keys of a sequence's full blocks: digests of the weights and of all tokens up to each block's end.

    Two blocks have one key only if their keys and values are equal, whoever asked for them: names do not come
    into it, but by the ``salt`` where an operator wants tenants kept apart.
    """

    def __init__(self, weights: bytes, salt: bytes, block_size: int) -> None:
        """``weights`` is a digest of all that hidden states follow from beside the tokens."""
        self._block_size = block_size
        root = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for part in (weights, salt):
            root.update(len(part).to_bytes(8, "little") + part)
        self._keys: list[bytes] = []
        self._root = root.digest()

    def extend(self, token_ids: Sequence[int]) -> list[bytes]:
        """The keys of all full blocks of the tokens, which begin with those of the call before."""
        while (len(self._keys) + 1) * self._block_size <= len(token_ids):
            start = len(self._keys) * self._block_size
            digest = hashlib.blake2b(self._keys[-1] if self._keys else self._root, digest_size=_DIGEST_BYTES)
            digest.update(array("i", token_ids[start : start + self._block_size]).tobytes())
            self._keys.append(digest.digest())
        return self._keys


class BlockPool:
    """Blocks 0 to n - 1: free, held by sequences, or kept because a later sequence may begin with them.

    A kept block is as good as free: the one unused for longest is given away first. Not thread-safe.
    """

    def __init__(self, num_blocks: int) -> None:
        """All are free.

        Raises:
            ValueError: there are none.
        """
        if num_blocks < 1:
            raise ValueError(f"a cache needs at least one block, not {num_blocks}")
        self.num_blocks = num_blocks
        self._holders = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict((block, None) for block in range(num_blocks))

    @property
    def num_unused(self) -> int:
        """Blocks that nobody holds; some of them hold what may be wanted again."""
        return len(self._unused)

    @property
    def num_held(self) -> int:
        """Blocks that sequences hold."""
        return self.num_blocks - len(self._unused)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """Holds the blocks of the longest run of ``keys`` from the first on that are there; returns them."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._hold(block)
            found.append(block)
        return found

    def take(self, count: int) -> list[int] | None:
        """Holds so many blocks of which nothing is kept any more; None, and no change, if there are fewer."""
        if count > len(self._unused):
            return None
        taken = []
        for _ in range(count):
            block = next(iter(self._unused))
            self._forget(block)
            self._hold(block)
            taken.append(block)
        return taken

    def keep(self, block: int, key: bytes) -> None:
        """Says that a held block is full and what it holds; another one with the same key stays the one."""
        if key not in self._block_of and block not in self._key_of:
            self._key_of[block] = key
            self._block_of[key] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Gives blocks back, each held once by the caller; the last of a sequence are reused first."""
        for block in reversed(blocks):
            if self._holders[block] < 1:
                raise ValueError(f"block {block} is given back, but nobody holds it")
            self._holders[block] -= 1
            if not self._holders[block]:
                self._unused[block] = None
                if block not in self._key_of:
                    self._unused.move_to_end(block, last=False)

    def _hold(self, block: int) -> None:
        self._holders[block] += 1
        self._unused.pop(block, None)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
