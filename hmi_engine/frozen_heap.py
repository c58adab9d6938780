"""Python's garbage collector, kept away from what lives as long as an engine."""

from __future__ import annotations

import gc
import threading

__all__ = ["FrozenHeap"]


class FrozenHeap:
    """Exempts all objects that there are now from garbage collection, until the last of its kind thaws.

    A full collection looks at every object of the process, for which it stops all threads: with torch,
    transformers and a thousand tenants a tenth of a second and more, again and again under load. What is
    there when an engine opens stays until it closes. Objects are freed as before when nobody refers to them;
    rings of objects that are garbage now are found once all has thawed. What the program has frozen itself
    stays so. Method: vLLM's ``freeze_gc_heap``.
    """

    _lock = threading.Lock()
    _num_frozen = 0
    _is_ours = False

    def __init__(self) -> None:
        """Freezes."""
        self._is_frozen = True
        with self._lock:
            if not FrozenHeap._num_frozen:
                FrozenHeap._is_ours = not gc.get_freeze_count()
            FrozenHeap._num_frozen += 1
            gc.freeze()

    def thaw(self) -> None:
        """Ends it; a second call does nothing."""
        with self._lock:
            if not self._is_frozen:
                return
            self._is_frozen = False
            FrozenHeap._num_frozen -= 1
            if not FrozenHeap._num_frozen and FrozenHeap._is_ours:
                gc.unfreeze()
