"""A ``tenant_limits`` of the operator's own that takes long, or asks the engine itself."""

import asyncio

import pytest

import hmi_engine as hmi


@pytest.mark.parametrize("kind", ["encoder_store", "decoder_store"])
def test_it_is_asked_without_a_lock(request, kind):
    submitted = []

    def limits(tenant):
        if engine._queue._lock.acquire(timeout=5):  # held for moments only, by other threads
            engine._queue._lock.release()
            submitted.append(engine.queue_stats().totals.submitted)
        return hmi.TenantLimits()

    engine = hmi.AsyncEngine(request.getfixturevalue(kind), tenant_limits=limits)

    async def main():
        async with engine:
            for _ in range(2):
                assert (await engine.submit(hmi.Request("a", text="the cell binds"))).error is None

    asyncio.run(main())
    assert submitted == [0, 1]
