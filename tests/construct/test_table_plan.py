"""Which n-grams get a row: against a plain sort, and within the budget of a real file."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import sentences

import hmi_engine as hmi
from hmi_engine.construct.table_plan import TableSettings, plan_table
from hmi_engine.errors import BudgetTooSmallError
from hmi_engine.knowledge.frequencies import Frequencies
from hmi_engine.knowledge.general import GeneralInfo
from hmi_kernels import plot_index_build


@pytest.fixture(scope="module")
def store(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> hmi.Store:
    return hmi.Store.create(tmp_path_factory.mktemp("plan") / "store", general=tiny_bert, plot_layers=2)


def frequencies(counts: Counter[int]) -> Frequencies:
    keys = torch.tensor(sorted(counts))
    return Frequencies(keys, torch.tensor([counts[int(key)] for key in keys]), float(sum(counts.values())))


def planned(general: GeneralInfo, counts: Counter[int], plot_bytes: int, **options: object) -> list[int]:
    plan = plan_table(
        frequencies(counts),
        TableSettings(plot_bytes, "float16", 2),
        general,
        layer_identity="any",
        corpus_tokens=0,
        documents=torch.empty(0, dtype=torch.int64),
        **options,  # type: ignore[arg-type]
    )
    assert set(plan.candidate_keys.tolist()) <= set(counts) - set(plan.keys.tolist())
    assert plan.keys.tolist() == sorted(plan.keys.tolist())
    return plan.keys.tolist()


COUNTS = Counter({key: 1 + key % 7 for key in range(1, 200)})


def test_the_most_frequent_come_first(store: hmi.Store) -> None:
    kept = planned(store.general, COUNTS, 20_000)
    ranked = sorted((key for key in COUNTS if COUNTS[key] >= 2), key=lambda key: (-COUNTS[key], key))
    assert 0 < len(kept) < len(ranked) and set(kept) == set(ranked[: len(kept)])


def test_what_ancestors_hold_is_left_to_them(store: hmi.Store) -> None:
    held = [key for key in COUNTS if COUNTS[key] == 7]
    kept = planned(store.general, COUNTS, 1 << 20, inherited=[plot_index_build(torch.tensor(held))])
    assert set(kept) == {key for key in COUNTS if 2 <= COUNTS[key] < 7}


def test_rows_stay_as_long_as_they_fit_and_promotions_are_bounded(store: hmi.Store) -> None:
    rare = [key for key in COUNTS if COUNTS[key] == 1]
    held = plot_index_build(torch.tensor(rare))
    kept = planned(store.general, COUNTS, 1 << 20, held=held, max_promotions=5)
    assert set(rare) <= set(kept) and len(kept) == len(rare) + 5
    assert {COUNTS[key] for key in set(kept) - set(rare)} == {7}


def test_a_budget_below_one_row_is_refused(store: hmi.Store) -> None:
    with pytest.raises(BudgetTooSmallError, match="one float16 row"):
        planned(store.general, COUNTS, 10)
    assert planned(store.general, COUNTS, 0) == []


def test_min_count_means_occurrences_at_any_weight(store: hmi.Store) -> None:
    for tokens in range(1, 40):
        seen = Frequencies.none().with_traffic(
            torch.tensor([7, 9]),
            torch.tensor([2.0, 1.0], dtype=torch.float64),
            tokens=tokens,
            occurrences=3,
            half_life_tokens=10,
        )
        plan = plan_table(
            seen,
            TableSettings(20_000, "float16", 2),
            store.general,
            layer_identity="any",
            corpus_tokens=0,
            documents=torch.empty(0, dtype=torch.int64),
        )
        assert plan.keys.tolist() == [7]


@pytest.mark.parametrize("row_format", ["float16", "float32", "int8"])
@pytest.mark.parametrize("plot_bytes", [40_000, 80_000])
def test_the_file_fits_the_budget(store: hmi.Store, row_format: str, plot_bytes: int) -> None:
    name = f"fits-{row_format}-{plot_bytes}"
    texts = sentences(300, seed=4)
    store.add_domain(name, texts, plot_bytes=plot_bytes, min_count=1, row_format=row_format)  # type: ignore[arg-type]
    assert 0.4 * plot_bytes < store.domains[name].bytes <= plot_bytes
    store.update_domain(name, sentences(300, seed=5))
    assert 0.4 * plot_bytes < store.domains[name].bytes <= plot_bytes
    assert store.verify() == []
