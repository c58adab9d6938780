"""What befalls one domain is its own tenants' alone: texts of other domains stay what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import sentences
from decoder_stores import PROMPTS, WHOLE, make_store

import hmi_engine as hmi
from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.plot_table import open_plot, write_plot

REQUESTS = [hmi.Request(name, text, sampling=WHOLE) for name in ("plain", "lawyer") for text in PROMPTS[:3]]


@pytest.fixture
def store(tiny_gpt2: Path, tmp_path: Path):
    with make_store(tmp_path / "s", tiny_gpt2, 2) as made:
        made.add_domain("law", sentences(60, seed=3), plot_bytes="1MiB", min_count=2)
        made.add_tenant("lawyer", domain="law", adapter=hmi.Adapter({}), head=hmi.GenerationHead())
        yield made


def table_file(store: hmi.Store, domain: str) -> Path:
    return store.layout.resolve(store.domains[domain].file)


def answers(responses: list[hmi.Response]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    assert all(response.error is None for response in responses), responses
    return [(response.token_ids, response.logprobs) for response in responses]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def send_astray(path: Path) -> None:
    """Every n-gram is at a row that the table does not have."""
    table = open_plot(path)
    index = table.index.clone()
    index[index[:, 0] != 0, 1] += 1 << 20
    write_plot(path, replace(table, index=index))


@pytest.mark.parametrize("damage", [cut, send_astray])
def test_a_damaged_table_fails_its_own_texts(store: hmi.Store, damage: Callable[[Path], None]) -> None:
    with hmi.Engine(store) as engine:
        expected = answers(engine.run(REQUESTS))
    path = table_file(store, "law")
    damage(path)
    with hmi.Engine(store) as engine:
        for _ in range(2):
            responses = engine.run(REQUESTS)
            assert answers(responses[:3]) == expected[:3]
            for response in responses[3:]:
                assert isinstance(response.error, StoreCorruptError) and path.name in str(response.error)
        assert engine.stats().generation["blocks_held"] == 0


def at_step(engine: hmi.Engine, number: int, change: Callable[[], None]) -> None:
    """Has ``change`` happen before the step of a number, counted from 1."""
    runner = engine._core.runner
    run, steps = runner.run, iter(range(1, number + 1))

    def step(scheduled):
        if next(steps, None) == number:
            change()
        return run(scheduled)

    runner.run = step


@pytest.mark.parametrize("options", [{}, {"miss": "exact"}, {"max_step_tokens": 6}])
def test_texts_of_a_domain_that_is_removed_meanwhile_go_on(store: hmi.Store, options: dict) -> None:
    with hmi.Engine(store, **options) as engine:
        expected = answers(engine.run(REQUESTS))

    def remove() -> None:
        store.remove_tenant("lawyer")
        store.remove_domain("law")

    with hmi.Engine(store, **options) as engine:
        at_step(engine, 12, remove)
        responses = engine.run(REQUESTS)
    assert "law" not in store.domains
    assert answers(responses) == expected


def test_a_table_that_is_damaged_meanwhile_ends_its_own_texts(store: hmi.Store) -> None:
    """It is opened anew in mid-generation, when an update has put another in its place."""
    with hmi.Engine(store) as engine:
        expected = answers(engine.run(REQUESTS))

    def update() -> None:
        store.update_domain("law", corpus=sentences(30, seed=4))
        cut(table_file(store, "law"))

    with hmi.Engine(store) as engine:
        at_step(engine, 12, update)
        responses = engine.run(REQUESTS)
    assert answers(responses[:3]) == expected[:3]
    assert all(isinstance(response.error, StoreCorruptError) for response in responses[3:])
