"""What a decoder holds from step to step: what texts under way need, and never what is out of date."""

from __future__ import annotations

import pytest
from conftest import sentences
from decoder_stores import PROMPTS

import hmi_engine as hmi
from hmi_engine.errors import HmiError, StoreCorruptError, UnknownDomainError
from hmi_engine.generation.step_leases import StepLeases

LONG = hmi.Sampling(max_tokens=12, ignore_end=True)


@pytest.fixture
def engine(mixed_store):
    with hmi.Engine(mixed_store) as opened:
        yield opened


@pytest.fixture
def core(engine):
    return engine._core


@pytest.fixture
def leases(core, mixed_store):
    opened = StepLeases(core.residency, core.plots, mixed_store.decoder, keep_tables=True)
    yield opened
    opened.release()


def users(core):
    return {placed.info.name: placed.users for placed in core.residency._placement.all()}


def test_tenants_are_asked_for_once_while_the_texts_stay_the_same(engine):
    engine.run([hmi.Request(name, "the", sampling=LONG) for name in ("lora", "plain")])
    adapters = engine.stats().adapters
    assert adapters["misses"] == 2
    # Not once for each of the twelve steps; once more when the prompts, or the first text, are at their end.
    assert adapters["hits"] <= 4


def test_nobody_is_held_when_all_texts_are_written(engine, core):
    engine.run([hmi.Request(name, PROMPTS[0], sampling=LONG) for name in ("lora", "plain", "bitfit")])
    assert set(users(core).values()) == {0}


def test_the_same_tenants_are_the_same_lease(leases, core, mixed_store):
    tenants = [mixed_store.tenants[name] for name in ("lora", "plain")]
    first = leases.residents(tenants)
    assert leases.residents(list(tenants)) is first
    assert users(core) == {"lora": 1, "plain": 1}
    leases.residents(tenants[:1])
    assert users(core) == {"lora": 1, "plain": 0}
    leases.release()
    assert set(users(core).values()) == {0}


def test_segments_follow_tenants_and_counts(leases, mixed_store):
    tenants = [mixed_store.tenants[name] for name in ("lora", "plain")]
    residents = leases.residents(tenants)
    batch = leases.adapters(residents, [1, 1])
    assert leases.adapters(residents, [1, 1]) is batch
    assert leases.adapters(residents, [1, 5]) is not batch
    batch = leases.adapters(residents, [1, 1])
    others = leases.residents([mixed_store.tenants[name] for name in ("bitfit", "plain")])
    assert leases.adapters(others, [1, 1]) is not batch


def test_a_tenant_that_could_not_be_had_is_asked_for_again(mixed_store):
    """No room for both at first; the one that had none finds it when it is alone."""
    tenants = [mixed_store.tenants[name] for name in ("lora", "bottleneck")]
    size = max(tenant.bytes for tenant in tenants)
    with hmi.Engine(mixed_store, host_memory=size + 4096) as engine:
        core = engine._core
        leases = StepLeases(core.residency, core.plots, mixed_store.decoder, keep_tables=True)
        outcomes = leases.residents(tenants)
        failed = [isinstance(outcome, HmiError) for outcome in outcomes]
        assert failed.count(True) == 1
        assert leases.residents(tenants) is not outcomes
        [resident] = leases.residents([tenants[failed.index(True)]])
        assert not isinstance(resident, HmiError)
        leases.release()


def test_a_changed_store_has_other_tables(leases, mixed_store):
    first = leases.tables(["news"])[0]
    assert leases.tables(["news", "news"])[0] is first
    mixed_store.add_domain("other", sentences(20, seed=5))
    second = leases.tables(["news"])[0]
    assert second is not first
    assert leases.tables(["news", "other"])[0] is not second


def test_what_was_computed_is_looked_for_again(core, mixed_store):
    leases = StepLeases(core.residency, core.plots, mixed_store.decoder, keep_tables=False)
    assert leases.tables(["news"])[0] is not leases.tables(["news"])[0]
    leases.release()


def test_a_domain_that_cannot_be_read_is_asked_for_again(leases, mixed_store):
    mixed_store.add_domain("other", sentences(20, seed=5))
    path = mixed_store.layout.resolve(mixed_store.domains["other"].file)
    content = path.read_bytes()
    path.write_bytes(content[:100])
    view, failed = leases.tables(["news", "other"])
    assert list(failed) == ["other"] and isinstance(failed["other"], StoreCorruptError)
    assert leases.tables(["news"]) == (view, {}), "the others' lease stays"
    path.write_bytes(content)
    assert leases.tables(["news", "other"])[1] == {}


def test_a_removed_domain_stays_for_the_steps_that_follow_one_another(leases, mixed_store):
    mixed_store.add_domain("other", sentences(20, seed=5))
    leases.tables(["news", "other"])
    mixed_store.remove_domain("other")
    view, failed = leases.tables(["news", "other"])
    assert failed == {}
    assert leases.tables(["news", "other"]) == (view, {})
    leases.tables(["news"])
    assert isinstance(leases.tables(["news", "other"])[1]["other"], UnknownDomainError)
