"""Decoders for many callers at once: streams, cancellation, tenants that change, a full queue, closing."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable

import pytest
from decoder_stores import PROMPTS, WHOLE

import hmi_engine as hmi
from hmi_engine.generation import service
from hmi_engine.generation.core import DecoderCore
from hmi_engine.generation.step import StepRunner
from hmi_engine.waiting_for_work import wait_for_work


async def collect(engine: hmi.AsyncEngine, request: hmi.Request, most: int | None = None):
    pieces, response = [], None
    async for piece in engine.stream(request):
        if isinstance(piece, hmi.Response):
            response = piece
        else:
            pieces.append(piece)
            if most is not None and len(pieces) >= most:
                break
    return pieces, response


def test_streams_are_what_run_gives(mixed_store: hmi.Store) -> None:
    names = list(mixed_store.tenants)
    requests = [
        hmi.Request(names[number % len(names)], text, sampling=WHOLE) for number, text in enumerate(PROMPTS)
    ]
    with hmi.Engine(mixed_store) as engine:
        expected = engine.run(requests)

    async def stream_all():
        async with hmi.AsyncEngine(mixed_store) as engine:
            return await asyncio.gather(*(collect(engine, request) for request in requests))

    for (pieces, response), whole in zip(asyncio.run(stream_all()), expected, strict=True):
        assert "".join(piece.text for piece in pieces) == response.text == whole.text
        assert tuple(piece.token_id for piece in pieces) == response.token_ids == whole.token_ids


def test_who_leaves_in_mid_stream_frees_its_blocks(mixed_store: hmi.Store) -> None:
    async def leave() -> dict:
        async with hmi.AsyncEngine(mixed_store) as engine:
            long = hmi.Request("lora", "the cell", sampling=hmi.Sampling(max_tokens=80, ignore_end=True))
            stream = engine.stream(long)
            async for _ in stream:
                break
            await stream.aclose()
            response = await engine.submit(hmi.Request("ia3", "the drug", sampling=WHOLE))
            assert response.error is None
            return engine.stats().generation

    statistics = asyncio.run(leave())
    assert statistics["blocks_held"] == 0 and statistics["running"] == 0
    assert statistics["generated_tokens"] < 80


def test_a_tenant_that_is_removed_or_replaced_while_it_generates(mixed_store: hmi.Store) -> None:
    async def change() -> list[hmi.Response]:
        async with hmi.AsyncEngine(mixed_store) as engine:
            long = hmi.Sampling(max_tokens=60, ignore_end=True)
            streams = [
                engine.stream(hmi.Request(name, "the cell", sampling=long)) for name in ("lora", "ia3")
            ]
            for stream in streams:
                await anext(stream)
            mixed_store.remove_tenant("lora")
            other = hmi.random_adapter(mixed_store.general, "lora", 2, 99)
            mixed_store.add_tenant(
                "ia3", domain="news", adapter=other, head=hmi.GenerationHead(), replace=True
            )
            found = []
            for stream in streams:
                async for piece in stream:
                    last = piece
                found.append(last)
            gone = await engine.submit(hmi.Request("lora", "the cell"))
            assert isinstance(gone.error, hmi.errors.UnknownTenantError)
            return found

    with hmi.Engine(mixed_store) as engine:
        long = hmi.Sampling(max_tokens=60, ignore_end=True)
        expected = engine.run([hmi.Request(name, "the cell", sampling=long) for name in ("lora", "ia3")])
    for response, before in zip(asyncio.run(change()), expected, strict=True):
        assert response.error is None and response.token_ids == before.token_ids, (
            "what began goes on as it was"
        )


def test_a_queue_that_is_full_refuses_at_once(mixed_store: hmi.Store) -> None:
    async def flood() -> int:
        limits = hmi.QueueLimits(max_queued_requests=4)
        async with hmi.AsyncEngine(mixed_store, queue_limits=limits, max_running=1) as engine:
            requests = [hmi.Request("lora", "the cell", sampling=WHOLE) for _ in range(40)]
            results = await asyncio.gather(*map(engine.submit, requests), return_exceptions=True)
            refused = [each for each in results if isinstance(each, hmi.errors.OverloadedError)]
            assert all(
                isinstance(each, hmi.Response) and each.error is None
                for each in results
                if each not in refused
            )
            return len(refused)

    assert 0 < asyncio.run(flood()) < 40


def test_closing_fails_what_runs_and_hangs_nobody(mixed_store: hmi.Store) -> None:
    async def close() -> list:
        engine = hmi.AsyncEngine(mixed_store)
        long = hmi.Sampling(max_tokens=90, ignore_end=True)
        tasks = [
            asyncio.create_task(engine.submit(hmi.Request("lora", "the", sampling=long))) for _ in range(50)
        ]
        await asyncio.sleep(0.05)
        await engine.close(finish=False)
        return await asyncio.gather(*tasks, return_exceptions=True)

    for result in asyncio.run(close()):
        error = result.error if isinstance(result, hmi.Response) else result
        assert error is None or isinstance(error, hmi.errors.EngineClosedError)


def test_what_is_refused_is_counted(mixed_store: hmi.Store) -> None:
    limits = hmi.TenantLimits(tokens_per_second=1e-9, burst_tokens=1)

    async def main() -> hmi.EngineStatistics:
        async with hmi.AsyncEngine(mixed_store, tenant_limits=lambda _: limits) as engine:
            good = hmi.Request("lora", "the cell", sampling=hmi.Sampling(max_tokens=3))
            assert (await engine.submit(good)).error is None
            assert (await engine.submit(good, timeout=0)).error is not None
            for bad in (hmi.Request("nobody", "the"), hmi.Request("ia3", "cell " * 200)):
                assert (await engine.submit(bad)).error is not None
            with pytest.raises(hmi.errors.OverloadedError, match="tokens_per_second"):
                await engine.submit(good)
            return engine.stats()

    statistics = asyncio.run(main())
    assert (statistics.requests, statistics.errors) == (5, 4)


def test_a_request_counts_what_can_be_generated_not_what_was_asked(mixed_store: hmi.Store) -> None:
    positions = mixed_store.general.max_positions
    asked = [
        hmi.Request("lora", "the", sampling=hmi.Sampling(max_tokens=most, ignore_end=True))
        for most in (positions, 5_000_000, 10**400)
    ]

    async def main() -> hmi.AsyncEngine:
        limits = hmi.QueueLimits(max_queued_tokens=len(asked) * positions, tenant_share=None)
        async with hmi.AsyncEngine(mixed_store, queue_limits=limits) as engine:
            answers = await asyncio.wait_for(asyncio.gather(*map(engine.submit, asked)), 60)
        for answer in answers:
            assert answer.error is None
            assert answer.usage.tokens + answer.usage.generated_tokens == positions
        return engine

    totals = asyncio.run(main()).queue_stats().totals
    assert totals.served_tokens == len(asked) * positions


class Gate:
    """Holds steps up until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_step: Callable[[], None] = lambda: None) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.sizes: list[int] = []
        run = StepRunner.run

        def held(runner, scheduled):
            self.reached.set()
            assert self.opened.wait(60)
            self.sizes.append(len(scheduled))
            on_step()
            return run(runner, scheduled)

        monkeypatch.setattr(StepRunner, "run", held)

    async def wait(self) -> None:
        assert await asyncio.to_thread(self.reached.wait, 60)


@pytest.mark.parametrize(("max_running", "sizes"), [(256, [1, 40]), (10, [1, 10, 10, 10, 10])])
def test_a_step_begins_with_all_that_it_can(
    mixed_store: hmi.Store, make_head, monkeypatch, max_running: int, sizes: list[int]
) -> None:
    head = make_head(mixed_store.general, pooling="last")
    mixed_store.add_tenant("judge", domain="news", adapter=hmi.Adapter({}), head=head)
    waited_while_queued = []

    async def main() -> None:
        gate = Gate(monkeypatch)
        async with hmi.AsyncEngine(mixed_store, max_running=max_running) as engine:
            queue = engine._queue

            def wait(arrived, has_work):
                waited_while_queued.append(not has_work() and len(queue._scheduler) > 0)
                wait_for_work(arrived, has_work)

            monkeypatch.setattr(service, "wait_for_work", wait)
            first = engine.submit_nowait(hmi.Request("judge", "the cell"))
            await gate.wait()
            others = [engine.submit_nowait(hmi.Request("judge", text)) for text in PROMPTS * 3 + PROMPTS[:4]]
            gate.opened.set()
            for future in (first, *others):
                assert (await asyncio.wrap_future(future)).error is None
        assert gate.sizes == sizes

    asyncio.run(main())
    assert waited_while_queued and not any(waited_while_queued)


def test_a_burst_of_arrivals_holds_up_no_text(mixed_store: hmi.Store, monkeypatch) -> None:
    """They are admitted some at a time, with a step of the texts under way in between."""
    events: list[int | str] = []
    admit = DecoderCore.admit

    def noted(core, requests):
        events.append(len(requests))
        return admit(core, requests)

    async def main() -> None:
        gate = Gate(monkeypatch, lambda: events.append("step"))
        monkeypatch.setattr(DecoderCore, "admit", noted)
        async with hmi.AsyncEngine(mixed_store) as engine:
            text = hmi.Request("lora", "the", sampling=hmi.Sampling(max_tokens=8, ignore_end=True))
            futures = [engine.submit_nowait(text)]
            await gate.wait()
            short = hmi.Request("ia3", "the", sampling=hmi.Sampling(max_tokens=1))
            futures += [engine.submit_nowait(short) for _ in range(150)]
            gate.opened.set()
            for future in futures:
                assert (await asyncio.wrap_future(future)).error is None

    asyncio.run(main())
    assert events[:8] == [1, "step", 64, "step", 64, "step", 22, "step"]


def test_who_leaves_while_it_waits_is_counted_as_answered(mixed_store: hmi.Store, monkeypatch) -> None:
    async def main() -> hmi.EngineStatistics:
        gate = Gate(monkeypatch)
        async with hmi.AsyncEngine(mixed_store, max_running=1) as engine:
            request = hmi.Request("lora", "the cell", sampling=hmi.Sampling(max_tokens=3, ignore_end=True))
            first, queued = engine.submit_nowait(request), engine.submit_nowait(request)
            await gate.wait()
            arrived = engine.submit_nowait(request)
            assert queued.cancel() and arrived.cancel()
            gate.opened.set()
            assert (await asyncio.wrap_future(first)).error is None
            await engine.drain()
            return engine.stats()

    statistics = asyncio.run(main())
    assert (statistics.requests, statistics.errors) == (3, 0)


def test_times_begin_when_the_request_comes(mixed_store: hmi.Store, monkeypatch) -> None:
    request = hmi.Request("lora", "the cell", sampling=hmi.Sampling(max_tokens=3, ignore_end=True))

    async def main() -> None:
        gate = Gate(monkeypatch)
        async with hmi.AsyncEngine(mixed_store) as engine:
            first = engine.submit_nowait(request)
            await gate.wait()
            second, sent = engine.submit_nowait(request), time.perf_counter()
            await asyncio.sleep(0.05)
            held = time.perf_counter() - sent
            gate.opened.set()
            assert (await asyncio.wrap_future(second)).timing.queue_seconds >= held
            await asyncio.wrap_future(first)
            statistics = engine.stats()
        stages = {stage: times["busy_seconds"] for stage, times in statistics.stages.items()}
        assert statistics.prepare_seconds == stages["fetch"] + stages["search"] > 0
        assert statistics.compute_seconds == stages["compute"] > 0

    asyncio.run(main())


async def come_and_go(store: hmi.Store, count: int) -> dict:
    """Random requests, of which many leave at a random moment; what the engine holds in the end."""
    draw = random.Random(3)
    names = [*store.tenants, "nobody"]
    options = {"cache_memory": 36_000, "max_running": 24, "max_step_tokens": 48}
    async with hmi.AsyncEngine(store, **options) as engine:

        async def one(number: int) -> None:
            sampling = hmi.Sampling(max_tokens=draw.randint(1, 12), temperature=1.0, seed=number)
            request = hmi.Request(draw.choice(names), draw.choice(PROMPTS), sampling=sampling)
            timeout = draw.choice([None, None, 0.0, 0.01])
            task = asyncio.create_task(engine.submit(request, timeout=timeout))
            if draw.random() < 0.4:
                await asyncio.sleep(draw.random() * 0.05)
                task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        for start in range(0, count, 100):
            await asyncio.gather(*(one(start + number) for number in range(min(100, count - start))))
        await engine.drain()
        while engine.stats().generation["running"]:
            await asyncio.sleep(0.001)
        assert not engine._core.residency._queue._waiting, "nobody waits for a tenant any more"
        return engine.stats().generation


def test_requests_that_come_and_go_leave_nothing(mixed_store: hmi.Store) -> None:
    statistics = asyncio.run(come_and_go(mixed_store, 300))
    assert (statistics["blocks_held"], statistics["waiting"]) == (0, 0)
    assert statistics["preemptions"] > 0


@pytest.mark.slow
def test_ten_thousand_requests_that_come_and_go_leave_nothing(mixed_store: hmi.Store) -> None:
    statistics = asyncio.run(come_and_go(mixed_store, 10_000))
    assert (statistics["blocks_held"], statistics["waiting"]) == (0, 0)
