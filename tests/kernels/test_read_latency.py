"""A simulated disk answers as late as it is told, and shares its bandwidth between reads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hmi_kernels import read_files, set_read_latency, start_reads


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def empty(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.uint8)


@pytest.fixture
def disk() -> Iterator[Callable[..., None]]:
    yield set_read_latency
    set_read_latency(0)


def test_each_read_takes_the_latency_longer(disk: Callable[..., None], tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"abcd")
    disk(0.1)
    tensors = [empty(4) for _ in range(4)]
    reads = start_reads([path, path, path, tmp_path / "missing"], [0] * 4, tensors)
    assert reads.wait()
    assert all(seconds >= 0.099 for seconds in reads.seconds_each)
    assert [bytes(tensor.tolist()) for tensor in tensors[:3]] == [b"abcd"] * 3
    one_by_one = start_reads([path] * 3, [0] * 3, [empty(4) for _ in range(3)], num_threads=1)
    assert one_by_one.wait() and one_by_one.seconds >= 0.299
    began = time.monotonic()
    assert read_files([path] * 2, [0] * 2, [empty(4) for _ in range(2)], num_threads=1) == [None] * 2
    assert time.monotonic() - began >= 0.199


def test_reads_at_the_same_time_share_the_bandwidth(disk: Callable[..., None], tmp_path: Path) -> None:
    path = write(tmp_path / "f", bytes(100_000))
    disk(0.05, 1_000_000)
    reads = start_reads([path] * 5, [0] * 5, [empty(100_000) for _ in range(5)], num_threads=5)
    assert reads.wait()
    assert reads.seconds >= 0.549, "half a megabyte, and the last one's latency"


def test_a_latency_can_be_switched_off(disk: Callable[..., None], tmp_path: Path) -> None:
    path = write(tmp_path / "f", b"abcd")
    disk(3600, 1)
    disk(0)
    assert start_reads([path], [0], [empty(4)]).wait(60.0)


@pytest.mark.parametrize("wrong", [(-1,), (3601,), (math.nan,), (0, 0.5), (0, -1), (0, math.nan)])
def test_impossible_disks_are_refused(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"seconds_per_read must lie in|bytes_per_second must be"):
        set_read_latency(*wrong)
