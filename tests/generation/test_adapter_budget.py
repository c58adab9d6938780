"""Which tenants' texts run beside each other, by what their adapters take."""

import pytest

from hmi_engine.generation.adapter_budget import AdapterBudget
from hmi_engine.knowledge.records import TenantInfo


@pytest.fixture
def tenants():
    """By their numbers."""
    return [TenantInfo.model_construct(id=number, generation=0, sha256="") for number in range(4)]


def test_what_is_pinned_meanwhile_takes_nothing(tenants):
    sizes, most = [10, 10, 10, 10], 20
    budget = AdapterBudget(lambda tenant: sizes[tenant.id], lambda: most)
    for tenant in tenants[:2]:
        assert budget.has_room_for(tenant)
        budget.add(tenant)
    assert not budget.has_room_for(tenants[2])
    sizes, most = [0, 10, 10, 0], 10
    assert not budget.has_room_for(tenants[2])
    assert budget.has_room_for(tenants[3])
    sizes, most = [0, 0, 10, 0], 10
    assert budget.has_room_for(tenants[2])
    most = 0
    assert not budget.has_room_for(tenants[2]) and budget.has_room_for(tenants[3])
    sizes, most = [10, 10, 10, 0], 20
    assert not budget.has_room_for(tenants[2]), "those that run are not pinned any more"


def test_one_that_is_alone_has_all_there_is(tenants):
    budget = AdapterBudget(lambda tenant: 30, lambda: 20)
    assert budget.has_room_for(tenants[0])
    budget.add(tenants[0])
    budget.add(tenants[0])
    assert budget.has_room_for(tenants[0]) and not budget.has_room_for(tenants[1])
    budget.remove(tenants[0])
    assert not budget.has_room_for(tenants[1])
    budget.remove(tenants[0])
    assert budget.has_room_for(tenants[1])
