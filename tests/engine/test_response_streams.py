"""Responses to many requests as they are done, whatever the source of the requests does."""

import asyncio

import pytest

import hmi_engine as hmi

SECONDS = 30  # far more than any of this takes


def test_a_source_that_waits_for_an_answer_gets_it(store, requests, expected):
    async def main():
        answered = asyncio.Event()

        async def one_after_the_other():
            for request in requests[:3]:
                yield request
                await answered.wait()
                answered.clear()

        async with hmi.AsyncEngine(store) as engine:
            stream = engine.stream(one_after_the_other())
            for request in requests[:3]:
                response = await asyncio.wait_for(anext(stream), SECONDS)
                assert response.id == request.id
                assert response.scores == pytest.approx(expected[request.id], abs=1e-5)
                answered.set()
            with pytest.raises(StopAsyncIteration):
                await asyncio.wait_for(anext(stream), SECONDS)

    asyncio.run(main())


def test_who_stops_early_ends_the_source_and_what_it_sent(store, requests):
    async def main():
        ended = []

        async def unending():
            try:
                yield requests[0]
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                ended.append(asyncio.current_task())

        async with hmi.AsyncEngine(store) as engine:
            stream = engine.stream(unending())
            await asyncio.wait_for(anext(stream), SECONDS)
            await asyncio.wait_for(stream.aclose(), SECONDS)
            assert len(ended) == 1

            stream = engine.stream(unending(), at_a_time=1)
            await asyncio.wait_for(anext(stream), SECONDS)
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            assert len(ended) == 2
            await asyncio.wait_for(engine.drain(), SECONDS)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_what_a_source_raises_is_raised(store, requests):
    async def main():
        async def broken():
            yield requests[0]
            raise ZeroDivisionError("on purpose")

        async with hmi.AsyncEngine(store) as engine:
            with pytest.raises(ZeroDivisionError, match="on purpose"):
                async for _ in engine.stream(broken()):
                    pass
            with pytest.raises(hmi.errors.InvalidRequestError, match="must be a Request"):
                async for _ in engine.stream([requests[0], "no request"]):
                    pass
            await asyncio.wait_for(engine.drain(), SECONDS)

    asyncio.run(main())


@pytest.mark.parametrize("at_a_time", [1, 7])
def test_no_more_are_drawn_than_may_be_under_way(store, requests, at_a_time):
    async def main():
        drawn, taken = [], []

        def source():
            for request in requests:
                drawn.append(request.id)
                assert len(drawn) - len(taken) <= at_a_time
                yield request

        async with hmi.AsyncEngine(store) as engine:
            stream = engine.stream(source(), at_a_time=at_a_time)
            while len(taken) < len(requests):
                taken.append(None)  # whoever asks for the next has taken the one before
                taken[-1] = (await anext(stream)).id
        assert sorted(taken) == drawn == [request.id for request in requests]

    asyncio.run(main())
