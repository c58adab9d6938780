"""Batches hold every sequence once, within both budgets, tenants together."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hmi_engine.schedule.batching import QueuedSequence, form_batches

SIZES = {tenant: 100 * (tenant + 1) for tenant in range(5)}
queues = st.lists(
    st.builds(
        lambda tokens, tenant: QueuedSequence(tenant, tokens, SIZES[tenant]),
        st.integers(1, 60),
        st.sampled_from(sorted(SIZES)),
    ),
    max_size=60,
)


@given(queues, st.integers(1, 200), st.integers(1, 2000))
def test_every_sequence_once_and_budgets_kept(queue, max_tokens, max_bytes):
    batches = list(form_batches(queue, max_batch_tokens=max_tokens, max_adapter_bytes=max_bytes))
    assert sorted(index for batch in batches for index in batch) == list(range(len(queue)))
    for batch in batches:
        tenants = [queue[index].tenant for index in batch]
        if len(batch) > 1:
            assert sum(queue[index].num_tokens for index in batch) <= max_tokens
        if len(set(tenants)) > 1:
            assert sum(SIZES[tenant] for tenant in set(tenants)) <= max_bytes
        runs = [
            tenant for number, tenant in enumerate(tenants) if number == 0 or tenants[number - 1] != tenant
        ]
        assert len(runs) == len(set(tenants)), "a tenant is one run"


@given(queues, st.integers(1, 200))
def test_first_come_first_served_and_no_needless_batch(queue, max_tokens):
    batches = list(form_batches(queue, max_batch_tokens=max_tokens, max_adapter_bytes=10**9))
    for before, after in itertools.pairwise(batches):
        assert max(before) < min(after)
        first = queue[min(after)].num_tokens
        assert sum(queue[index].num_tokens for index in before) + first > max_tokens
