"""Many callers at once: each gets its own answer, exactly once, whatever the others and the engine do."""

import asyncio
import statistics
import threading
import time

import pytest

import hmi_engine as hmi
from hmi_engine.errors import DeadlineExceededError, EngineClosedError, EngineFaultError, OverloadedError
from hmi_engine.pipeline.step import BatchRunner
from hmi_engine.schedule.limits import QueueLimits, TenantLimits
from hmi_engine.serving_core import ServingCore


def check(responses, expected):
    for response in responses:
        assert response.error is None
        assert response.scores == pytest.approx(expected[response.id], abs=1e-5)


class Gate:
    """Holds batches up before they are computed, until it is opened."""

    def __init__(self, monkeypatch):
        self.reached, self.opened = threading.Event(), threading.Event()
        compute = BatchRunner._compute

        def held(runner, *arguments):
            self.reached.set()
            assert self.opened.wait(60)
            return compute(runner, *arguments)

        monkeypatch.setattr(BatchRunner, "_compute", held)

    async def wait(self):
        assert await asyncio.to_thread(self.reached.wait, 60)


def test_everybody_gets_their_own_answer(store, requests, expected):
    async def main():
        async with hmi.AsyncEngine(store, max_batch_tokens=100) as engine:
            check(await asyncio.gather(*map(engine.submit, requests)), expected)
            check([response async for response in engine.stream(requests, at_a_time=7)], expected)
            statistics = engine.stats()
            assert statistics.requests == 2 * len(requests) and statistics.errors == 0
            assert engine.queue_stats().totals.served == 2 * len(requests)
            assert statistics.stages["tokenise"]["batches"] >= 1

    asyncio.run(main())


def test_from_threads_too(store, requests, expected):
    async def main():
        async with hmi.AsyncEngine(store, max_batch_tokens=100) as engine:
            answers = []

            def ask(own):
                answers.extend(future.result(60) for future in [engine.submit_nowait(each) for each in own])

            threads = [threading.Thread(target=ask, args=(requests[n::6],)) for n in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                await asyncio.to_thread(thread.join)
            check(answers, expected)
            assert sorted(answer.id for answer in answers) == [request.id for request in requests]

    asyncio.run(main())


def test_bad_requests_are_answered_beside_good_ones(store, requests, expected):
    bad = [
        hmi.Request("nobody", text="a", id="unknown"),
        hmi.Request("t1", id="empty"),
        hmi.Request("t1", input_ids=[-1], id="ids"),
    ]

    async def main():
        async with hmi.AsyncEngine(store) as engine:
            responses = await asyncio.gather(*map(engine.submit, [*requests, *bad]))
        check(responses[: len(requests)], expected)
        assert all(isinstance(response.error, hmi.HmiError) for response in responses[len(requests) :])

    asyncio.run(main())


@pytest.mark.parametrize("finish", [True, False])
def test_closing_leaves_nobody_waiting(store, requests, expected, monkeypatch, finish):
    async def main():
        gate = Gate(monkeypatch)
        engine = hmi.AsyncEngine(store, max_batch_tokens=60)
        tasks = [asyncio.create_task(engine.submit(request)) for request in requests]
        await gate.wait()
        closing = asyncio.create_task(engine.close(finish=finish))
        await asyncio.sleep(0.05)
        with pytest.raises(EngineClosedError):
            await engine.submit(requests[0])
        gate.opened.set()
        await asyncio.wait_for(closing, 60)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        answered = [result for result in results if isinstance(result, hmi.Response)]
        check(answered, expected)
        failed = [result for result in results if not isinstance(result, hmi.Response)]
        assert all(isinstance(error, EngineClosedError) for error in failed)
        assert bool(failed) != finish and answered
        await engine.close()

    asyncio.run(main())


def test_whoever_leaves_frees_what_waits(store, requests, expected, monkeypatch):
    async def main():
        gate = Gate(monkeypatch)
        async with hmi.AsyncEngine(store, max_batch_tokens=60) as engine:
            tasks = [asyncio.create_task(engine.submit(request)) for request in requests]
            await gate.wait()
            while engine.queue_stats().totals.submitted < len(requests):
                await asyncio.sleep(0.01)
            for task in tasks[::2]:
                task.cancel()
            await asyncio.sleep(0.05)
            totals = engine.queue_stats().totals
            assert totals.cancelled == len(tasks[::2])
            gate.opened.set()
            check(await asyncio.gather(*tasks[1::2]), expected)
            results = await asyncio.gather(*tasks[::2], return_exceptions=True)
            assert all(isinstance(result, asyncio.CancelledError) for result in results)
            await engine.drain()
            assert not engine._core.residency._queue._waiting, "nobody's weights are waited for"

    asyncio.run(main())


def test_a_full_queue_refuses_at_once(store, requests, expected, monkeypatch):
    async def main():
        gate = Gate(monkeypatch)
        limits = QueueLimits(max_queued_requests=5)
        async with hmi.AsyncEngine(store, max_batch_tokens=20, queue_limits=limits) as engine:
            tasks = [asyncio.create_task(engine.submit(request)) for request in requests]
            await gate.wait()
            await asyncio.sleep(0.2)
            refused = [task for task in tasks if task.done()]
            assert len(refused) >= len(requests) - 5 - 20
            assert all(isinstance(task.exception(), OverloadedError) for task in refused)
            gate.opened.set()
            kept = [task for task in tasks if task not in refused]
            check(await asyncio.gather(*kept), expected)
            with pytest.raises(OverloadedError) as caught:
                for request in requests:
                    engine.submit_nowait(request)
            assert caught.value.retry_after_seconds > 0

    asyncio.run(main())


def test_a_tenants_own_limits(store, requests):
    def limits(tenant):
        return TenantLimits(max_concurrent=1) if tenant == "t0" else TenantLimits()

    async def main():
        async with hmi.AsyncEngine(store, tenant_limits=limits) as engine:
            own = [hmi.Request("t0", text="the cell binds")] * 5
            others = [request for request in requests if request.tenant != "t0"]
            results = await asyncio.gather(*map(engine.submit, own + others), return_exceptions=True)
            assert any(isinstance(result, hmi.Response) for result in results[:5])
            assert any(isinstance(result, OverloadedError) for result in results[:5])
            assert all(isinstance(result, hmi.Response) for result in results[5:])

    asyncio.run(main())


def test_timeouts_pass_while_waiting(store, requests, expected, monkeypatch):
    async def main():
        gate = Gate(monkeypatch)
        async with hmi.AsyncEngine(store, max_batch_tokens=20, pipeline_depth=1) as engine:
            patient = asyncio.create_task(engine.submit(requests[0]))
            await gate.wait()
            hurried = [asyncio.create_task(engine.submit(r, timeout=0.05)) for r in requests[1:4]]
            await asyncio.sleep(0.2)
            gate.opened.set()
            check([await patient], expected)
            for task in hurried:
                assert isinstance((await task).error, DeadlineExceededError)

    asyncio.run(main())


def test_what_waits_is_loaded_before_its_batch_is_formed(store, fleet, monkeypatch):
    """While a batch of one is computed and another is prepared, the ten tenants after them come in."""
    may_compute, compute = threading.Semaphore(1), BatchRunner._compute

    def held(runner, *arguments):
        assert may_compute.acquire(timeout=60)
        return compute(runner, *arguments)

    monkeypatch.setattr(BatchRunner, "_compute", held)

    async def main():
        async with hmi.AsyncEngine(store, max_batch_tokens=6, pipeline_depth=2) as engine:
            await engine.submit(hmi.Request(fleet[0], text="the cell binds"))
            first = asyncio.create_task(engine.submit(hmi.Request(fleet[0], text="the cell binds")))
            while engine.queue_stats().running_requests == 0:
                await asyncio.sleep(0.001)
            tasks = [
                asyncio.create_task(engine.submit(hmi.Request(name, text="the cell binds"))) for name in fleet
            ]
            while engine.queue_stats().totals.submitted < len(fleet) + 2:
                await asyncio.sleep(0.001)
            may_compute.release()
            await first
            deadline = time.monotonic() + 30
            while engine.stats().resident_tenants < len(fleet):
                assert time.monotonic() < deadline, engine.stats()
                await asyncio.sleep(0.001)
            assert engine.queue_stats().totals.served == 2, "all others wait"
            may_compute.release(len(fleet))
            await asyncio.gather(*tasks)
            assert engine.stats().adapters["files_read"] == len(fleet)

    asyncio.run(main())


def test_a_latency_target_makes_batches_smaller(store, fleet, monkeypatch):
    """Compute that takes 2 ms a token and a target of 0.3 s: some 50 tokens, when that has been learnt."""
    compute, sizes = BatchRunner._compute, []

    def slow(runner, searched):
        sizes.append(searched.sequences.num_tokens)
        time.sleep(0.002 * sizes[-1])
        return compute(runner, searched)

    monkeypatch.setattr(BatchRunner, "_compute", slow)
    requests = [hmi.Request(fleet[n % 12], text="the cell binds a gene") for n in range(60)]
    usual, largest = {}, {}

    async def main(target):
        async with hmi.AsyncEngine(store, latency_target=target, max_batch_tokens=500) as engine:
            for _ in range(2):
                sizes.clear()
                await asyncio.gather(*map(engine.submit, requests))
            usual[target], largest[target] = statistics.median(sizes), max(sizes)
            costs = engine.stats().costs
            assert 0.001 < costs["compute"]["per_token"] + costs["compute"]["fixed"] / 50 < 0.02
            assert "fetch" in costs

    for target in (0.3, None):
        asyncio.run(main(target))
    assert usual[0.3] < 100 < largest[None]  # one after a stall of the machine may be larger
    for target in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"latency_target is {target}, must be above 0"):
            hmi.AsyncEngine(store, latency_target=target)


@pytest.mark.parametrize("stage", ["admit", "respond"])
def test_a_stage_that_throws_fails_its_own_requests(store, requests, expected, monkeypatch, stage):
    original, calls = getattr(ServingCore, stage), []

    def second_fails(core, *arguments):
        calls.append(None)
        if len(calls) == 2:
            raise ZeroDivisionError("on purpose")
        return original(core, *arguments)

    async def main():
        async with hmi.AsyncEngine(store) as engine:
            monkeypatch.setattr(ServingCore, stage, second_fails)
            check([await engine.submit(requests[0])], expected)
            assert isinstance((await engine.submit(requests[1])).error, EngineFaultError)
            check([await engine.submit(requests[2])], expected)
            assert not engine._core.residency._queue._waiting

    asyncio.run(main())


def test_a_broken_engine_fails_everybody_and_says_why(store, requests, monkeypatch):
    async def main():
        engine = hmi.AsyncEngine(store)

        def broken(*_, **__):
            raise ZeroDivisionError("on purpose")

        monkeypatch.setattr(engine._queue._scheduler, "next_batch", broken)
        results = await asyncio.gather(*map(engine.submit, requests), return_exceptions=True)
        assert all(isinstance(result, EngineClosedError) for result in results)
        assert any("on purpose" in str(result) for result in results)
        await engine.close()

    asyncio.run(main())


def test_the_event_loop_may_end_first(store, requests):
    engines, tasks = [], []

    async def leave_early():
        engines.append(hmi.AsyncEngine(store))
        tasks.extend(asyncio.ensure_future(engines[0].submit(request)) for request in requests)
        await asyncio.sleep(0)

    asyncio.run(leave_early())
    asyncio.run(engines[0].close())
    assert not engines[0]._core.residency._queue._waiting


def test_a_thousand_submitters_leave_at_once(store, fleet, make_sentences, requests, expected):
    texts = make_sentences(1000, seed=9)

    async def main():
        async with hmi.AsyncEngine(store, max_batch_tokens=200) as engine:
            tasks = [
                asyncio.create_task(engine.submit(hmi.Request(fleet[n % 12], text=text)))
                for n, text in enumerate(texts)
            ]
            await asyncio.sleep(0.05)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            check(await asyncio.gather(*map(engine.submit, requests)), expected)
            await engine.drain()
            assert not engine._core.residency._queue._waiting
            assert engine.queue_stats().queued_requests == engine.queue_stats().running_requests == 0

    asyncio.run(main())
