"""Least bytes, operations and the roofline, by cases computed by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.agreement import largest_error, relative_error
from benchmarks.gpu.costs import bottleneck_cost, copy_cost, lookup_cost, lora_cost, merge_cost, vector_cost
from benchmarks.gpu.result import Speed
from benchmarks.gpu.roofline import Peak, data_sheet_peak, least_seconds, roofline_share


def test_lora() -> None:
    cost = lora_cost([(3, 8), (0, 16), (1, 4)], input_size=10, output_sizes=[20], element_bytes=2)
    # x [4, 10]; output [4, 20] read and written; blocks of rank 8 and 4, that of no tokens not.
    elements = 4 * 10 + 2 * 4 * 20 + (8 + 4) * (10 + 20)
    # 4 offsets of 8 bytes, 3 slots of 4, 3 entries of offset 8, rank 4, scale 4.
    assert cost.bytes == 2 * elements + 4 * 8 + 3 * 4 + 3 * 16
    assert cost.flop == 2 * (3 * 8 + 1 * 4) * (10 + 20)


def test_lora_reads_x_once_for_all_projections() -> None:
    cost = lora_cost([(2, 8)], input_size=10, output_sizes=[20, 5], element_bytes=2)
    elements = 2 * 10 + 2 * 2 * 25 + 8 * (10 + 20) + 8 * (10 + 5)
    assert cost.bytes == 2 * elements + 2 * 8 + 4 + 2 * 16
    assert cost.flop == 2 * 2 * 8 * (10 + 20 + 10 + 5)


@pytest.mark.parametrize("has_layer_norm", [False, True])
def test_bottleneck(has_layer_norm: bool) -> None:
    cost = bottleneck_cost([(5, 8)], hidden_size=16, element_bytes=2, has_layer_norm=has_layer_norm)
    # x, output twice; down, up, their biases; weight and bias of the norm.
    elements = 3 * 5 * 16 + (2 * 16 * 8 + 8 + 16) + 2 * 16 * has_layer_norm
    assert cost.bytes == 2 * elements + 2 * 8 + 4 + 20
    assert cost.flop == 2 * 2 * 5 * 8 * 16


def test_vectors_lookup_merge_copies() -> None:
    assert vector_cost([2, 0, 1], hidden_size=4, element_bytes=2).bytes == 2 * (6 + 2) * 4 + 32 + 12 + 24
    cost = lookup_cost(num_tokens=10, num_sequences=2, distinct_keys=7, window=3)
    assert cost.bytes == 10 * (4 + 3 * 8) + 3 * 8 + 2 * 4 + 7 * 16
    cost = merge_cost(
        num_tokens=10,
        num_sequences=2,
        row_slots=6,
        unigram_rows=3,
        position_rows=5,
        hidden_size=8,
        window=2,
        row_bytes=1,
        element_bytes=2,
    )
    assert cost.bytes == 6 * (8 + 4) + (3 + 5 + 10 + 2) * 16 + 10 * (4 + 8) + 3 * 8 + 2 * 4
    assert copy_cost([3, 4]).bytes == 7


def test_roofline_takes_the_slower_of_bytes_and_operations() -> None:
    peak = Peak(bandwidth=100.0, flops=1000.0)
    cost = lora_cost([(1, 1)], input_size=1, output_sizes=[1], element_bytes=2)
    assert (cost.bytes, cost.flop) == (2 * (1 + 2 + 2) + 16 + 4 + 16, 4)
    assert least_seconds(cost, peak) == cost.bytes / 100
    assert roofline_share(cost, peak, 2 * cost.bytes / 100) == pytest.approx(0.5)
    assert least_seconds(cost, Peak(1e9, 2.0)) == 2.0


def test_speed_follows_from_the_median() -> None:
    cost = copy_cost([2_000_000])
    speed = Speed.of([2e-6, 1e-6, 4e-6], cost, Peak(2e12, 1.0))
    assert speed.microseconds.value == pytest.approx(2.0)
    assert speed.gigabytes_per_second == pytest.approx(1000.0)
    assert speed.teraflops_per_second == 0
    assert speed.share_of_roofline == pytest.approx(0.5)


def test_data_sheets_are_found_by_name() -> None:
    assert data_sheet_peak("NVIDIA H100 80GB HBM3") == Peak(3.35e12, 989e12)
    assert data_sheet_peak("NVIDIA H200") == Peak(4.8e12, 989e12)
    assert data_sheet_peak("NVIDIA L40S") == Peak(0.864e12, 362e12)
    assert data_sheet_peak("Some GPU") is None


def test_errors_are_relative_and_nan_is_infinite() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected + torch.tensor([0.0, 0.5]), expected) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, float("nan")]), expected) == float("inf")
    assert largest_error(torch.float16) == 2 * 2**-10
