"""How a thread that computes waits when there is nothing to compute."""

from __future__ import annotations

import threading
from collections.abc import Callable

import hmi_kernels

__all__ = ["wait_for_work"]

_SECONDS_UNTIL_REST = 1.0
"""Starting a team takes some ten microseconds for each of its threads, far less than a thousandth of this."""


def wait_for_work(arrived: threading.Condition, has_work: Callable[[], bool]) -> None:
    """Returns when ``has_work`` holds, which is looked at whenever ``arrived`` is notified.

    A thread that has had nothing to do for a second lets go of its team, which would make the teams of all
    others that compute in this process slower (:func:`hmi_kernels.release_team`): another engine's, or the
    program's own.

    Args:
        arrived: whose lock the caller holds, and has again afterwards.
        has_work: called with the lock.
    """
    if not arrived.wait_for(has_work, _SECONDS_UNTIL_REST):
        hmi_kernels.release_team()
        arrived.wait_for(has_work)
