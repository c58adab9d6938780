"""A batch's adapters on their way to the device: who waits for which of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from hmi_engine.memory.streams import Arrival, DeviceStreams
from hmi_engine.pipeline.stage_clock import StageClock

__all__ = ["ArrivingAdapters"]


class ArrivingAdapters:
    """Lets the stream ``compute`` wait for what arrivals bring; the host never waits."""

    def __init__(self, streams: DeviceStreams, arrivals: Sequence[Arrival], clock: StageClock) -> None:
        self._streams, self._arrivals, self._clock = streams, arrivals, clock

    def before_layer(self, index: int) -> AbstractContextManager[None]:
        """Waits for a layer's adapters; the context shows in the trace how long the host is busy with it."""
        for arrival in self._arrivals:
            event = arrival.before_layer(index)
            if event is not None:
                self._streams.wait("compute", event)
        traced = self._clock.around_layer
        return nullcontext() if traced is None else traced(index)

    def before_heads(self) -> None:
        """Waits for everything."""
        for arrival in self._arrivals:
            self._streams.wait("compute", arrival.everything)
