"""What the stages of an engine did from one moment to another."""

from __future__ import annotations

from hmi_engine.pipeline.stage_clock import StageTimes, hidden_share
from hmi_engine.serving_core import EngineStatistics

__all__ = ["hidden_share_between", "stage_seconds"]


def stage_seconds(
    after: EngineStatistics, before: EngineStatistics, of: str = "busy_seconds"
) -> dict[str, float]:
    """What each stage worked from one moment to another; or another of the seconds of ``StageTimes``."""
    started = before.stages or {}
    return {
        name: float(times[of]) - float(started.get(name, {}).get(of, 0.0))
        for name, times in (after.stages or {}).items()
    }


def hidden_share_between(after: EngineStatistics, before: EngineStatistics) -> float | None:
    """Of fetching and searching from one moment to another, what compute did not wait for, as a share.

    None where there was nothing of it.
    """
    worked, waited = stage_seconds(after, before), stage_seconds(after, before, of="waiting_seconds")
    return hidden_share(
        {name: StageTimes(busy_seconds=worked[name], waiting_seconds=waited[name]) for name in worked}
    )
