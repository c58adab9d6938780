"""A deadline that passes at the worst moment: whoever is too late is told, and nobody waits for ever."""

import asyncio
import time

import pytest

import hmi_engine as hmi
from hmi_engine.errors import DeadlineExceededError

FIRST = hmi.Request("a", text="the cell binds")


class Clock:
    """A scheduler's clock that can be put forward."""

    def __init__(self, scheduler):
        self.ahead = 0.0
        scheduler._clock = lambda: time.perf_counter() + self.ahead


def after_it_was_told_of(scheduler):
    """The deadline passes between the last look for those that are too late and the forming of a batch."""
    clock, expire = Clock(scheduler), scheduler.expire

    def expire_and_let_time_pass():
        expired = expire()
        clock.ahead += 60 * bool(len(scheduler))
        return expired

    scheduler.expire = expire_and_let_time_pass


def before_its_thread_woke_up(scheduler):
    """The deadline passes before the thread that was woken has the lock, and another sees it first."""
    clock, submit = Clock(scheduler), scheduler.submit

    def submit_and_let_time_pass(*arguments):
        submit(*arguments)
        clock.ahead += 60
        scheduler.peek(1)

    scheduler.submit = submit_and_let_time_pass


@pytest.mark.parametrize("passes", [after_it_was_told_of, before_its_thread_woke_up])
@pytest.mark.parametrize("kind", ["encoder_store", "decoder_store"])
def test_who_is_too_late_is_told_without_a_further_arrival(request, kind, passes):
    async def main():
        async with hmi.AsyncEngine(request.getfixturevalue(kind)) as engine:
            passes(engine._queue._scheduler)
            answer = await asyncio.wait_for(engine.submit(FIRST, timeout=30), 20)
            assert isinstance(answer.error, DeadlineExceededError)
            await asyncio.wait_for(engine.drain(), 20)
            assert engine.queue_stats().totals.expired == 1
            assert not engine._core.residency._queue._waiting, "what it needs is waited for no more"

    asyncio.run(main())
