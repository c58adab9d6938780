"""Traffic counts come back from their file as they were, and a damaged file says so."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from hmi_engine.errors import StoreCorruptError, StoreVersionError
from hmi_engine.knowledge.tensor_file import file_sha256, write_tensors
from hmi_engine.knowledge.traffic_file import TrafficCounts, read_traffic, write_traffic


def some_counts() -> TrafficCounts:
    return TrafficCounts(
        keys=torch.tensor([3, 8, 2**61]),
        weights=torch.tensor([1.0, 0.5, 4e9], dtype=torch.float64),
        occurrences=5e9,
        max_error=2.5,
        tokens=7_000_000_000,
        windows=6,
        hits=5,
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    st.dictionaries(st.integers(1, 2**62), st.floats(1e-6, 1e18)),
    st.floats(0, 1e18),
    st.floats(0, 1e9),
    st.integers(0, 2**50),
    st.lists(st.integers(0, 2**50), min_size=2, max_size=2).map(sorted),
)
def test_counts_come_back(
    tmp_path: Path,
    items: dict[int, float],
    occurrences: float,
    max_error: float,
    tokens: int,
    seen: list[int],
) -> None:
    keys = torch.tensor(sorted(items), dtype=torch.int64)
    weights = torch.tensor([items[key] for key in sorted(items)], dtype=torch.float64)
    counts = TrafficCounts(keys, weights, occurrences, max_error, tokens, windows=seen[1], hits=seen[0])
    path = tmp_path / "traffic.safetensors"
    assert write_traffic(path, counts) == file_sha256(path)
    found = read_traffic(path)
    assert torch.equal(found.keys, keys) and torch.equal(found.weights, weights)
    for field in fields(TrafficCounts)[2:]:
        assert getattr(found, field.name) == getattr(counts, field.name)


def test_the_safetensors_library_reads_the_file(tmp_path: Path) -> None:
    write_traffic(tmp_path / "file", some_counts())
    loaded = load_file(tmp_path / "file")
    assert torch.equal(loaded["keys"], some_counts().keys)
    assert torch.equal(loaded["weights"], some_counts().weights)
    with safe_open(tmp_path / "file", "pt") as file:
        assert json.loads(file.metadata()["hmi"])["tokens"] == 7_000_000_000


def test_nothing_comes_back_as_nothing(tmp_path: Path) -> None:
    write_traffic(tmp_path / "file", TrafficCounts.none())
    found = read_traffic(tmp_path / "file")
    assert (len(found.keys), found.tokens, found.occurrences) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.tensor([3, 8])}, "int64"),
        ({"keys": torch.tensor([3.0, 8.0, 9.0])}, "int64"),
        ({"weights": torch.ones(3)}, "float64"),
        ({"keys": torch.tensor([8, 3, 9])}, "ascending"),
        ({"keys": torch.tensor([0, 3, 9])}, "positive"),
        ({"keys": torch.tensor([3, 3, 9])}, "distinct"),
        ({"weights": torch.tensor([1.0, 0.0, 1.0]).double()}, "positive"),
        ({"weights": torch.tensor([1.0, float("inf"), 1.0]).double()}, "finite"),
        ({"weights": torch.tensor([1.0, float("nan"), 1.0]).double()}, "positive"),
        ({"tokens": -1}, "negative"),
        ({"hits": 7}, "7 of 6 windows"),
    ],
)
def test_impossible_counts_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(some_counts(), **changes)


def test_every_cut_and_other_files_are_told(tmp_path: Path) -> None:
    path = tmp_path / "traffic.safetensors"
    write_traffic(path, some_counts())
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(StoreCorruptError, match=r"traffic\.safetensors"):
            read_traffic(path)
    with pytest.raises(StoreCorruptError, match="missing"):
        read_traffic(tmp_path / "missing")


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({}, {"format": "hmi-plot"}, "no traffic file"),
        ({}, {"format_version": "one"}, "no traffic file"),
        ({}, {"hmi": "{}"}, "metadata"),
        ({}, {"hmi": '{"occurrences":NaN,"max_error":0,"tokens":1,"windows":1,"hits":1}'}, "metadata"),
        ({"more": torch.zeros(1)}, {}, "tensors"),
        ({"weights": torch.ones(3)}, {}, "tensors"),
        ({"weights": -torch.ones(3).double()}, {}, "positive"),
        ({"keys": torch.tensor([5, 4, 6])}, {}, "ascending"),
    ],
)
def test_files_of_other_content_are_told(
    tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], message: str
) -> None:
    counts = some_counts()
    path = tmp_path / "file"
    write_traffic(path, counts)
    with safe_open(path, "pt") as file:
        written = file.metadata()
    write_tensors(path, {"keys": counts.keys, "weights": counts.weights} | tensors, written | metadata)
    with pytest.raises(StoreCorruptError, match=message):
        read_traffic(path)


def test_a_newer_format_is_told(tmp_path: Path) -> None:
    write_tensors(tmp_path / "file", {}, {"format": "hmi-traffic", "format_version": "2"})
    with pytest.raises(StoreVersionError, match="upgrade"):
        read_traffic(tmp_path / "file")
