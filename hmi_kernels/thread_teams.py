"""The teams of threads that torch's operations and the CPU kernels run on."""

from __future__ import annotations

from hmi_kernels.native import native, native_reason

__all__ = ["release_team"]


def release_team() -> None:
    """Ends the threads that wait for the calling thread's next parallel operation, torch's or ours.

    OpenMP keeps a team for every thread that has ever run such an operation. Where these are more threads
    than there are processors, libgomp's teams go to sleep at each barrier instead of waiting actively for
    some microseconds, and waking up costs more than most operations do. So a thread that hands its work over
    to another, as one that opens an :class:`hmi_engine.AsyncEngine`, should let go of its team. Its next
    operation starts a new one. Source: ``gomp_throttled_spin_count_var`` and ``gomp_pause_host`` in GCC's
    libgomp.
    """
    if not native_reason:
        native.release_team()
