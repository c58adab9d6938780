"""copy_batch_async and CopyEvent: in host memory, and on the emulated CUDA runtime by every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulator.device_streams import (
    Device,
    Schedule,
    assert_right_under_all_schedules,
    assert_wrong_under_some_schedule,
    emulated_device,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import hmi_kernels
from hmi_kernels.copies import CopyEvent, copy_batch_async, wait_for_copies
from hmi_kernels.errors import CudaError
from hmi_kernels.native import native
from hmi_kernels.pinned_pool import PinnedPool

LATEST = Schedule("latest")
METHODS = ["auto", "loop", "batch", "kernel"]
SIZES = st.lists(st.one_of(st.integers(0, 40), st.integers(0, 40_000)), max_size=12)


@pytest.fixture
def device() -> Iterator[Device]:
    with emulated_device(LATEST) as opened:
        yield opened


@pytest.fixture
def pool(device: Device) -> Iterator[PinnedPool]:
    with PinnedPool(64 << 20) as opened:
        yield opened
        wait_for_copies()


def cut(buffer: torch.Tensor, sizes: list[int], gap: int) -> list[torch.Tensor]:
    """Pieces of these sizes, with ``gap`` bytes before each."""
    pieces, position = [], 0
    for size in sizes:
        pieces.append(buffer[position + gap : position + gap + size])
        position += gap + size
    return pieces


# ---- What arrives ----


@given(sizes=SIZES, gap=st.integers(0, 3))
@settings(deadline=None)
def test_host_copies_are_done_at_once(sizes: list[int], gap: int) -> None:
    buffer = torch.randint(0, 256, (sum(sizes) + gap * len(sizes) + 1,), dtype=torch.uint8)
    sources = cut(buffer, sizes, gap)
    destinations = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    assert copy_batch_async(destinations, sources).query()
    for destination, source in zip(destinations, sources, strict=True):
        assert torch.equal(destination, source)


@settings(max_examples=40, deadline=None)
@given(
    sizes=SIZES,
    gaps=st.tuples(st.sampled_from([0, 16, 1, 8]), st.sampled_from([0, 16, 3])),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 5),
)
def test_every_method_copies_every_byte_and_no_other(
    sizes: list[int], gaps: tuple[int, int], method: str, seed: int
) -> None:
    def total(gap: int) -> int:
        return sum(sizes) + gap * len(sizes) + 16

    with emulated_device(Schedule("random", seed)) as device, PinnedPool(1 << 20) as pool:
        source = pool.empty(total(gaps[0]), torch.uint8)
        source.copy_(torch.randint(0, 256, source.shape, dtype=torch.uint8))
        target = device.empty([total(gaps[1])], torch.uint8)
        expected = target.clone()
        for piece, new in zip(cut(expected, sizes, gaps[1]), cut(source, sizes, gaps[0]), strict=True):
            piece.copy_(new)
        copied = copy_batch_async(
            cut(target, sizes, gaps[1]),
            cut(source, sizes, gaps[0]),
            stream=device.stream(),
            method=method,
        )
        copied.synchronize()
        assert torch.equal(target, expected)


@pytest.mark.parametrize("method", METHODS)
def test_more_pieces_than_one_launch_takes(device: Device, pool: PinnedPool, method: str) -> None:
    sources = pool.empty([400, 32], torch.float16)
    sources.copy_(torch.randn(400, 32))
    targets = device.empty([400, 32], torch.float16)
    order = torch.randperm(400).tolist()
    copied = copy_batch_async(
        [targets[i] for i in order], [sources[i] for i in order], stream=device.stream(), method=method
    )
    copied.synchronize()
    assert torch.equal(targets, sources)


def test_pieces_larger_than_a_grid_covers_at_once(device: Device, pool: PinnedPool) -> None:
    source, target = pool.empty([(1 << 20) + 5], torch.uint8), device.empty([(1 << 20) + 5], torch.uint8)
    source.copy_(torch.randint(0, 256, source.shape, dtype=torch.uint8))
    copy_batch_async([target], [source], stream=device.stream(), method="kernel").synchronize()
    assert torch.equal(target, source)


@pytest.mark.parametrize("method", ["loop", "batch"])
@pytest.mark.parametrize("direction", ["device to device", "device to pinned"])
def test_other_directions(device: Device, pool: PinnedPool, method: str, direction: str) -> None:
    source = device.empty([1000]).copy_(torch.randn(1000))
    target = device.empty([1000]) if direction == "device to device" else pool.empty([1000])
    copy_batch_async([target], [source], stream=device.stream(), method=method).synchronize()
    assert torch.equal(target, source)


def test_dtypes_and_shapes_may_differ(device: Device, pool: PinnedPool) -> None:
    source = pool.empty([4, 8], torch.float16).fill_(1)
    target = device.empty([64], torch.uint8)
    copy_batch_async([target], [source], stream=device.stream()).synchronize()
    assert torch.equal(target, source.view(torch.uint8).flatten())


def test_nothing_to_copy(device: Device) -> None:
    pair = [torch.ones(0)], [torch.ones(0)]
    for method in METHODS:
        copy_batch_async([], [], stream=device.stream(), method=method).synchronize()
        copy_batch_async(*pair, stream=device.stream(), method=method).synchronize()


# ---- Which method ----


def chosen(
    device: Device, sizes: list[int], stream: int, pool: PinnedPool, *, misaligned: bool = False
) -> str:
    shift = 1 if misaligned else 0
    sources = [pool.empty(size + 1, torch.uint8)[shift : size + shift] for size in sizes]
    targets = [device.empty([size], torch.uint8) for size in sizes]
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (targets, sources)]
    _, method = device.module.copy_batch(*addresses, sizes, "auto", stream)
    device.synchronize(stream)
    return str(method)


def test_auto_follows_its_table(device: Device, pool: PinnedPool) -> None:
    stream = device.stream()
    assert chosen(device, [100], stream, pool) == "loop"
    assert chosen(device, [1 << 20] * 2, stream, pool) == "batch"
    assert chosen(device, [4096] * 8, stream, pool) == "batch"
    # What cannot be used is not chosen: the legacy default stream takes no batches.
    assert chosen(device, [4096] * 8, 0, pool) == "kernel"
    assert chosen(device, [4096] * 8, 0, pool, misaligned=True) == "loop"
    assert chosen(device, [1 << 18] * 8, 0, pool) == "loop"
    device.fail_next("cudaDriverGetVersion", "invalid value", count=2)
    assert chosen(device, [1 << 18] * 8, 0, pool) == "loop"


def test_auto_copies_pageable_memory_in_a_loop(device: Device) -> None:
    targets = [device.empty([256]) for _ in range(8)]
    sources = list(torch.randn(8, 256))
    copy_batch_async(targets, sources, stream=device.stream()).synchronize()
    assert all(torch.equal(*pair) for pair in zip(targets, sources, strict=True))


# ---- Bad input: an error, and nothing is written ----

BAD_INPUT: dict[
    str, tuple[Callable[[torch.Tensor], tuple[Any, Any]], dict[str, Any], type[Exception], str]
] = {
    "numbers": (lambda t: ([t[0], t[1]], [t[2]]), {}, ValueError, "there are 2 destinations but 1 sources"),
    "sizes": (
        lambda t: ([t[0], t[1, :3]], [t[2], t[3]]),
        {},
        ValueError,
        r"destinations\[1\] has 12 bytes, but sources\[1\] 32",
    ),
    "destination with gaps": (
        lambda t: ([t[:2, 0]], [t[2, :2]]),
        {},
        ValueError,
        r"destinations\[0\] must be cont",
    ),
    "source with gaps": (
        lambda t: ([t[2, :2]], [t[:2, 0]]),
        {},
        ValueError,
        r"sources\[0\] must be contiguous",
    ),
    "no tensor": (lambda t: ([t[0]], [[1.0] * 8]), {}, TypeError, r"sources\[0\] must be a tensor, not list"),
    "destinations that meet": (
        lambda t: ([t[0], t[1], t.flatten()[4:12]], [t[2], t[3], t[3]]),
        {},
        ValueError,
        "destinations 0 and 2 share memory",
    ),
    "source in a destination": (
        lambda t: ([t[0], t[1]], [t[2], t.flatten()[7:15]]),
        {},
        ValueError,
        "source 1 and destination 0 share memory",
    ),
    "method": (
        lambda t: ([t[0]], [t[2]]),
        {"method": "best"},
        ValueError,
        "method must be one of auto, loop",
    ),
    "device": (
        lambda t: ([torch.empty(8, device="meta")], [t[0]]),
        {},
        ValueError,
        "must be in host memory and on one GPU, not on cpu, meta",
    ),
}


@pytest.mark.parametrize("where", ["host", "device"])
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_before_anything_is_copied(name: str, where: str) -> None:
    make, options, error, message = BAD_INPUT[name]
    with emulated_device() as device:
        tensors = (device.empty([4, 8]) if where == "device" else torch.empty(4, 8)).copy_(
            torch.arange(32.0).view(4, 8)
        )
        before = tensors.clone()
        if where == "device":
            with pytest.raises(error, match=message):
                copy_batch_async(*make(tensors), stream=device.stream(), **options)
    if where == "host":
        with pytest.raises(error, match=message):
            copy_batch_async(*make(tensors), **options)
    assert torch.equal(tensors, before)


def test_host_tensors_take_no_stream_and_no_device_method() -> None:
    pair = [torch.zeros(4)], [torch.ones(4)]
    with pytest.raises(ValueError, match="stream must be None"):
        copy_batch_async(*pair, stream=1234)
    for method in ("batch", "kernel"):
        with pytest.raises(
            ValueError, match=f"method {method} cannot be used: all tensors are in host memory"
        ):
            copy_batch_async(*pair, method=method)
    assert pair[0][0].tolist() == [0] * 4


RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.integers(0, 8)), max_size=6)


@given(RANGES)
def test_shared_memory_is_found_wherever_it_is(ranges: list[tuple[int, int, int]]) -> None:
    buffer = torch.arange(70, dtype=torch.uint8)
    expected = buffer.clone()
    destinations, sources = [], []
    for destination, source, size in ranges:
        destinations.append(set(range(destination, destination + size)))
        sources.append(set(range(source, source + size)))
        expected[destination : destination + size] = buffer[source : source + size]
    shared = any(
        first & second
        for index, first in enumerate(destinations)
        for second in (*destinations[index + 1 :], *sources)
    )
    pieces = (
        [buffer[destination : destination + size] for destination, _, size in ranges],
        [buffer[source : source + size] for _, source, size in ranges],
    )
    if shared:
        with pytest.raises(ValueError, match="share memory"):
            copy_batch_async(*pieces)
    else:
        copy_batch_async(*pieces)
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_stream_of_another_device_is_refused(device: Device, pool: PinnedPool, method: str) -> None:
    target, source = device.empty([8], device=1).fill_(0), pool.empty([8]).fill_(1)
    with pytest.raises(ValueError, match="stream is device 0's, but the tensors are on device 1"):
        copy_batch_async([target], [source], stream=device.stream(0), method=method)
    copy_batch_async([target], [source], stream=device.stream(1), method=method).synchronize()
    assert target.tolist() == [1] * 8


def test_the_kernel_reads_page_locked_memory_only(device: Device, pool: PinnedPool) -> None:
    target, stream = device.empty([8]).fill_(0), device.stream()
    pinned = pool.empty([8]).fill_(1)
    second = device.empty([8])
    with pytest.raises(ValueError, match="source 1 is in pageable memory"):
        copy_batch_async([target, second], [pinned, torch.ones(8)], stream=stream, method="kernel")
    with pytest.raises(ValueError, match="destination 0 is not in device memory"):
        copy_batch_async([torch.ones(8)], [pinned], stream=stream, method="kernel")
    assert device.is_idle(stream) and target.tolist() == [0] * 8


def test_why_batch_cannot_be_used_is_told(device: Device, pool: PinnedPool) -> None:
    pair = [device.empty([8])], [pool.empty([8])]
    with pytest.raises(ValueError, match="method batch cannot be used: the stream is the legacy default"):
        copy_batch_async(*pair, stream=0, method="batch")
    stream = device.stream()
    with pytest.raises(ValueError, match="the stream is being captured"), device.captured(stream):
        copy_batch_async(*pair, stream=stream, method="batch")
    device.fail_next("cudaDriverGetVersion", "invalid value", count=2)
    with pytest.raises(ValueError, match=r"the driver is older than CUDA 12\.8"):
        copy_batch_async(*pair, stream=stream, method="batch")


# ---- Failures of the device ----


@pytest.mark.parametrize(
    ("method", "function", "name"),
    [
        ("loop", "cudaMemcpyAsync", "cudaMemcpyAsync"),
        ("batch", "cudaMemcpyBatchAsync", "cudaMemcpyBatchAsync"),
        ("kernel", "cudaLaunchKernel", "launch of gather_pieces"),
        ("loop", "cudaEventRecord", "cudaEventRecord"),
    ],
)
def test_errors_name_the_call(
    device: Device, pool: PinnedPool, method: str, function: str, name: str
) -> None:
    stream, target, source = device.stream(), device.empty([8]), pool.empty([8]).fill_(1)
    device.fail_next(function, "launch failure")
    with pytest.raises(CudaError, match=rf"{name} failed: cudaErrorLaunchFailure \(719\)"):
        copy_batch_async([target], [source], stream=stream, method=method)
    assert device.take_last_error() == 0
    copy_batch_async([target], [source], stream=stream, method=method).synchronize()
    assert target.tolist() == [1] * 8


def test_copies_that_were_started_before_one_failed_have_ended(device: Device, pool: PinnedPool) -> None:
    stream, targets = device.stream(), [device.empty([8]) for _ in range(3)]
    sources = [pool.empty([8]).fill_(1) for _ in range(3)]
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (targets, sources)]
    with pytest.raises(CudaError):
        device.module.copy_batch(*addresses, [32, 32, 64], "loop", stream)  # the third is too long
    assert device.is_idle(stream)
    assert [target.tolist() for target in targets[:2]] == [[1] * 8] * 2 and targets[2].isnan().all()


def test_copies_that_could_not_be_given_an_event_have_ended(device: Device, pool: PinnedPool) -> None:
    stream, target, source = device.stream(), device.empty([8]), pool.empty([8]).fill_(1)
    device.fail_next("cudaEventRecord", "launch failure")
    with pytest.raises(CudaError, match="cudaEventRecord"):
        copy_batch_async([target], [source], stream=stream, method="loop")
    source.fill_(2)  # nobody keeps it, so the pool may hand it out
    assert target.tolist() == [1] * 8


# ---- Events ----


def test_events_are_done_layer_by_layer(device: Device, pool: PinnedPool) -> None:
    stream = device.stream()
    slots = [device.empty([8]) for _ in range(4)]
    blocks = [pool.empty([8]).fill_(layer) for layer in range(4)]
    copied = [copy_batch_async([slots[layer]], [blocks[layer]], stream=stream) for layer in range(4)]
    for layer, event in enumerate(copied):
        # A call asks how far the copies before it are, which drives them on; nobody has asked for the last.
        assert slots[-1].isnan().all()
        event.synchronize()
        assert slots[layer].tolist() == [layer] * 8


def test_tensors_are_kept_until_their_copies_are_done(device: Device, pool: PinnedPool) -> None:
    copied = copy_batch_async([device.empty([8])], [pool.empty([8])], stream=device.stream())
    assert pool.bytes_in_use == 4096
    copied.record(device.stream())  # the event is used for something else: the copy is not done
    copied.synchronize()
    copy_batch_async([], [])
    assert pool.bytes_in_use == 4096
    wait_for_copies()
    assert pool.bytes_in_use == 0


def test_an_event_without_record_is_done() -> None:
    with emulated_device() as device:
        event = CopyEvent()
        event.wait(device.stream())
        event.synchronize()
        assert event.query()


def test_events_without_a_gpu_are_done() -> None:
    event = copy_batch_async([torch.zeros(4)], [torch.ones(4)])
    event.record()
    event.wait()
    event.keep(torch.ones(1))
    event.synchronize()
    assert event.query()


def test_events_are_reused(device: Device, pool: PinnedPool) -> None:
    target, source, stream = device.empty([8]), pool.empty([8]), device.stream()
    for _ in range(3):
        copy_batch_async([target], [source], stream=stream).synchronize()
        wait_for_copies()
    device.fail_next("cudaEventCreateWithFlags", "out of memory")
    copy_batch_async([target], [source], stream=stream).synchronize()  # creates none


# ---- Captures ----


@pytest.mark.parametrize("method", ["auto", "loop", "kernel"])
def test_captured_copies_run_with_the_graph(device: Device, pool: PinnedPool, method: str) -> None:
    stream, other = device.stream(), device.stream()
    targets, sources = device.empty([8, 32]), pool.empty([8, 32])
    copy_batch_async([device.empty([4])], [pool.empty([4])], stream=other)  # under way while we capture
    with device.captured(stream) as graphs:
        copied = copy_batch_async(list(targets), list(sources), stream=stream, method=method)
        pool.empty([100_000])  # takes new memory: allowed, and does not spoil the capture
    for value in (1, 2):
        sources.fill_(value)
        device.launch(graphs[0], stream)
        device.synchronize(stream)
        assert (targets == value).all()
    with pytest.raises(CudaError, match="cudaEventQuery failed: cudaErrorCapturedEvent"):
        copied.query()


# ---- Order between copies and kernels ----


def scale_by_a_fresh_adapter(device: Device, *, waits: bool) -> None:
    """A tenant's vector is copied into the arena on one stream and used by an op on another."""
    copy, slots = device.stream(), torch.tensor([0])
    arena = device.empty([256], torch.float16).fill_(0)
    hidden_states = torch.ones(4, 256, dtype=torch.float16)
    segments = torch.tensor([0, 4]), torch.tensor([0], dtype=torch.int32)
    with PinnedPool(1 << 16) as pool:
        vector = pool.empty([256], torch.float16).fill_(3)
        copied = copy_batch_async([arena], [vector], stream=copy)
        if waits:
            copied.wait()
        hmi_kernels.grouped_scale(hidden_states, arena, *segments, slots)
        device.synchronize(0)
        assert (hidden_states == 3).all()
        wait_for_copies()


def test_an_op_that_waits_for_the_copy_sees_the_new_adapter() -> None:
    assert_right_under_all_schedules(lambda device: scale_by_a_fresh_adapter(device, waits=True))


def test_an_op_that_does_not_wait_is_caught() -> None:
    assert_wrong_under_some_schedule(lambda device: scale_by_a_fresh_adapter(device, waits=False))


def test_native_pieces_must_be_equally_many() -> None:
    with pytest.raises(ValueError, match="equally many"):
        native.copy_pieces([1], [], [])
