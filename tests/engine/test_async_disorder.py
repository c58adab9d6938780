"""An asynchronous engine in disorder: requests come, leave and expire; stages take as long as they like."""

import asyncio
import random
import time

import pytest
from arena_accounts import lost_bytes

import hmi_engine as hmi
from hmi_engine.errors import DeadlineExceededError
from hmi_engine.pipeline.step import BatchRunner
from hmi_engine.serving_core import ServingCore


class Delays:
    """Sleeps a little at random at every stage boundary."""

    def __init__(self, monkeypatch, seed):
        self.random = random.Random(seed)
        for owner, name in (
            (ServingCore, "admit"),
            (ServingCore, "respond"),
            (BatchRunner, "prepare"),
            (BatchRunner, "_search"),
            (BatchRunner, "_compute"),
            (BatchRunner, "discard"),
        ):
            monkeypatch.setattr(owner, name, self.delayed(getattr(owner, name)))

    def delayed(self, function):
        def call(*arguments):
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 0.003)
            return function(*arguments)

        return call


async def everything_is_free(engine, seconds=20.0):
    """What was cancelled while it was admitted is drained already, but let go of a moment later."""
    residency, queue = engine._core.residency, engine._queue
    end = time.monotonic() + seconds
    while any(held := [residency._queue._waiting, residency._users, queue._unanswered, queue._formed]):
        assert time.monotonic() < end, f"never let go of: {held}"
        await asyncio.sleep(0.001)
    assert not lost_bytes(residency)


def stress(store, requests, expected, monkeypatch, seed):
    """One run: requests come, leave and are answered in disorder; nothing is lost, doubled or mixed up."""
    draw = random.Random(seed)
    largest = max(info.bytes for info in store.tenants.values())

    async def ask(engine, request):
        await asyncio.sleep(draw.random() * 0.01)
        return await engine.submit(request, timeout=draw.choice([None, 5.0, 0.002]))

    async def main():
        options = {
            "pipeline_depth": draw.randint(1, 4),
            "max_batch_tokens": draw.choice([20, 60, 200]),
            "host_memory": draw.choice(["1GiB", 6 * largest]),
        }
        async with hmi.AsyncEngine(store, **options) as engine:
            chosen = [draw.choice(requests) for _ in range(draw.randint(1, 80))]
            tasks = [asyncio.create_task(ask(engine, request)) for request in chosen]
            leaving = [task for task in tasks if draw.random() < 0.2]
            await asyncio.sleep(draw.random() * 0.02)
            for task in leaving:
                task.cancel()
            results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 120)
            await engine.drain()
            await everything_is_free(engine)
        for request, task, result in zip(chosen, tasks, results, strict=True):
            if isinstance(result, asyncio.CancelledError):
                assert task in leaving
            elif isinstance(result.error, DeadlineExceededError):
                assert result.id == request.id
            else:
                assert result.error is None and (result.id, result.tenant) == (request.id, request.tenant)
                assert result.scores == pytest.approx(expected[request.id], abs=1e-5)

    with monkeypatch.context() as patched:
        Delays(patched, seed)
        asyncio.run(main())


@pytest.mark.parametrize("seed", range(12))
def test_disorder(store, requests, expected, monkeypatch, seed):
    stress(store, requests, expected, monkeypatch, seed)


@pytest.mark.slow
def test_disorder_thousands_of_times(store, requests, expected, monkeypatch):
    for seed in range(100, 3100):
        stress(store, requests, expected, monkeypatch, seed)
