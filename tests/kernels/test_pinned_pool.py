"""PinnedPool: the budget, the reuse of memory, and what happens when either runs out."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from emulator.device_streams import Schedule, emulated_device
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from hmi_kernels.copies import CopyEvent, copy_batch_async, wait_for_copies
from hmi_kernels.errors import CudaError, PoolClosedError, PoolExhaustedError
from hmi_kernels.native import native
from hmi_kernels.pinned_pool import PinnedPool

KIB = 1 << 10
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool]


@pytest.fixture(params=["plain", "pinned"])
def kind(request: pytest.FixtureRequest) -> Iterator[str]:
    """Ordinary memory, and page-locked memory of the emulated CUDA runtime."""
    if request.param == "plain":
        yield request.param
        return
    with emulated_device():
        yield request.param


# ---- Sizes ----


@given(st.integers(1, 1 << 40))
def test_rounding_wastes_at_most_an_eighth(num_bytes: int) -> None:
    size = native.block_size(num_bytes)
    assert size >= num_bytes and size % 4096 == 0
    assert size - num_bytes < max(4096, num_bytes / 8)
    assert native.block_size(size) == size


@given(st.integers(16, 40))
def test_sizes_are_few(exponent: int) -> None:
    doubling = range(1 << exponent, 1 << (exponent + 1), 1 << (exponent - 7))
    assert len({native.block_size(num_bytes) for num_bytes in doubling}) <= 9


# ---- Tensors ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_of_the_shape_and_dtype_asked_for(kind: str, dtype: torch.dtype) -> None:
    with PinnedPool(64 * KIB) as pool:
        assert pool.is_pinned == (kind == "pinned")
        for shape in ([3, 5, 2], [7], [1, 1]):
            tensor = pool.empty(shape, dtype)
            assert list(tensor.shape) == shape and tensor.dtype is dtype
            assert tensor.is_contiguous() and tensor.data_ptr() % 4096 == 0
            assert torch.equal(tensor.fill_(1), torch.ones(shape, dtype=dtype))


def test_empty_tensors_take_nothing(kind: str) -> None:
    with PinnedPool(0) as pool:
        assert pool.empty([0, 8]).shape == (0, 8) and pool.empty(0).shape == (0,)
        assert pool.bytes_reserved == 0


def test_memory_comes_back_with_the_last_view(kind: str) -> None:
    with PinnedPool(64 * KIB) as pool:
        tensor = pool.empty([4, 8])
        address, view = tensor.data_ptr(), tensor[2:, 1]
        del tensor
        assert pool.bytes_in_use == 4096
        view.fill_(1)
        del view
        assert (pool.bytes_in_use, pool.bytes_reserved) == (0, 4096)
        assert pool.empty([1000]).data_ptr() == address  # reused for another shape of that size


@pytest.mark.parametrize("shape", [-1, [2, -3]])
def test_a_negative_shape_is_refused(shape: int | list[int]) -> None:
    with PinnedPool(KIB) as pool, pytest.raises(ValueError, match="shape must not be negative"):
        pool.empty(shape)


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="budget_bytes must not be negative, but is -1"):
        PinnedPool(-1)


# ---- The budget ----


def test_what_does_not_fit_is_refused_with_all_numbers(kind: str) -> None:
    with PinnedPool(40 * KIB) as pool:
        tensor = pool.empty(20 * KIB, torch.int8)
        text = r"20481 bytes .*\(24576 with rounding\), but 20480 of the pool's budget of 40960 bytes"
        with pytest.raises(PoolExhaustedError, match=text):
            pool.empty(20 * KIB + 1, torch.int8)
        assert pool.empty(20 * KIB, torch.int8).shape == (20 * KIB,)
        del tensor
        with pytest.raises(PoolExhaustedError):
            pool.empty(1 << 62, torch.int8)


def test_memory_kept_for_other_sizes_gives_way_oldest_first(kind: str) -> None:
    with PinnedPool(32 * KIB) as pool:
        held = [pool.empty(size * KIB, torch.int8) for size in (4, 8, 12)]
        newest = held[2].data_ptr()
        for _ in range(3):
            held.pop(0)
        assert (pool.bytes_in_use, pool.bytes_reserved) == (0, 24 * KIB)
        large = pool.empty(16 * KIB, torch.int8)
        # 8 KiB were free and 12 + 4 + 8 kept: the first two kept went.
        assert pool.bytes_reserved == 28 * KIB
        assert pool.empty(12 * KIB, torch.int8).data_ptr() == newest
        del large


class PoolMachine(RuleBasedStateMachine):
    """Any history of requests: the model is the list of living tensors."""

    tensors = Bundle("tensors")
    BUDGET = 96 * KIB

    def __init__(self) -> None:
        super().__init__()
        self.pool = PinnedPool(self.BUDGET)
        self.living: dict[int, torch.Tensor] = {}

    def in_use(self) -> int:
        return sum(native.block_size(tensor.nbytes) for tensor in self.living.values())

    @rule(target=tensors, num_bytes=st.integers(1, 70 * KIB))
    def ask(self, num_bytes: int) -> int:
        fits = self.in_use() + native.block_size(num_bytes) <= self.BUDGET
        try:
            tensor = self.pool.empty(num_bytes, torch.uint8)
        except PoolExhaustedError:
            assert not fits
            return -1
        assert fits
        key = len(self.living) + 1 + max(self.living, default=0)
        self.living[key] = tensor.fill_(key % 251)
        return key

    @rule(key=consumes(tensors))
    def drop(self, key: int) -> None:
        self.living.pop(key, None)

    @invariant()
    def books_are_right(self) -> None:
        assert self.pool.bytes_in_use == self.in_use()
        assert self.pool.bytes_in_use <= self.pool.bytes_reserved <= self.BUDGET

    @invariant()
    def tensors_are_apart_and_untouched(self) -> None:
        ranges = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in self.living.values()
        )
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(ranges))
        assert all((tensor == key % 251).all() for key, tensor in self.living.items())

    def teardown(self) -> None:
        self.pool.close()


TestPool = PoolMachine.TestCase
TestPool.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_threads_share_a_pool(kind: str) -> None:
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        try:
            for _ in range(100):
                size = int(torch.randint(1, 16 * KIB, (), generator=generator))
                tensor = pool.empty(size, torch.uint8).fill_(seed)
                assert (tensor == seed).all()
                del tensor
        except BaseException as error:
            errors.append(error)

    # Four tensors of up to 16 KiB always fit, so nobody may be refused.
    with PinnedPool(64 * KIB) as pool:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert pool.bytes_in_use == 0 and pool.bytes_reserved <= 64 * KIB


# ---- Closing ----


def test_a_closed_pool_gives_nothing_and_takes_nothing_away(kind: str) -> None:
    pool = PinnedPool(64 * KIB)
    kept, dropped = pool.empty([4]).fill_(1), pool.empty([4000])
    del dropped
    pool.close()
    pool.close()
    assert pool.is_closed and pool.bytes_reserved == pool.bytes_in_use == 4096
    for shape in (4, 0):
        with pytest.raises(PoolClosedError, match="the pool is closed"):
            pool.empty(shape)
    assert kept.tolist() == [1] * 4
    del kept
    assert pool.bytes_reserved == 0


def test_tensors_outlive_their_pool(kind: str) -> None:
    tensor = PinnedPool(4096).empty([4]).fill_(1)
    assert tensor.tolist() == [1] * 4


# ---- The machine has less than the budget ----


def test_out_of_memory_leaves_the_pool_usable() -> None:
    with emulated_device() as device, PinnedPool(64 * KIB) as pool:
        held = pool.empty(8 * KIB, torch.int8)
        device.fail_next("cudaHostAlloc", "out of memory")
        with pytest.raises(CudaError, match=r"cudaHostAlloc failed: cudaErrorMemoryAllocation \(2\)"):
            pool.empty(16 * KIB, torch.int8)
        assert pool.bytes_in_use == pool.bytes_reserved == held.nbytes
        assert device.take_last_error() == 0  # or the next launch would be blamed
        assert pool.empty(16 * KIB, torch.int8).nbytes == 16 * KIB


def test_memory_kept_for_reuse_is_given_up_before_out_of_memory_is_told() -> None:
    with emulated_device() as device, PinnedPool(64 * KIB) as pool:
        for size in (8, 12):
            pool.empty(size * KIB, torch.int8)
        assert pool.bytes_reserved == 20 * KIB
        device.fail_next("cudaHostAlloc", "out of memory")
        tensor = pool.empty(16 * KIB, torch.int8)
        assert pool.bytes_reserved == tensor.nbytes


# ---- Copies under way ----


def test_memory_is_not_reused_while_a_copy_reads_it() -> None:
    with emulated_device(Schedule("latest")) as device, PinnedPool(8 * KIB) as pool:
        stream, target = device.stream(), device.empty([1024])
        source = pool.empty([1024]).fill_(1)
        address = source.data_ptr()
        copied = copy_batch_async([target], [source], stream=stream)
        del source
        assert pool.empty([1024]).fill_(2).data_ptr() != address
        copied.synchronize()
        assert target.tolist() == [1] * 1024
        both = [pool.empty([1024]), pool.empty([1024])]  # now the pool gets it back
        assert address in [tensor.data_ptr() for tensor in both]


def test_an_event_keeps_what_other_work_reads() -> None:
    with emulated_device(Schedule("latest")) as device, PinnedPool(4096) as pool:
        stream, total, read = device.stream(), torch.zeros(()), CopyEvent()
        rows = pool.empty([4]).fill_(1)
        address = rows.data_ptr()
        device.submit(stream, lambda: total.add_(view_at(address).sum()))
        read.record(stream)
        read.keep(rows)
        del rows
        with pytest.raises(PoolExhaustedError):
            pool.empty([4])
        read.synchronize()
        assert pool.empty([4]).data_ptr() == address and total == 4


def view_at(address: int) -> torch.Tensor:
    """Four floats that nobody keeps alive, as a kernel sees them."""
    return torch.frombuffer((ctypes.c_float * 4).from_address(address), dtype=torch.float32)


# ---- Memory that exists ----


def test_registered_memory_is_page_locked_until_the_pool_is_closed() -> None:
    with emulated_device(Schedule("latest")) as device:
        tensor, target = torch.ones(1000), device.empty([1000])
        with PinnedPool(5000) as pool:
            pool.register(tensor)
            assert pool.bytes_in_use == 4000
            # Method kernel reads page-locked memory only.
            copy_batch_async([target], [tensor], stream=device.stream(), method="kernel")
            address = tensor.data_ptr()
            del tensor
        # Closing has waited for the copy.
        assert target.tolist() == [1] * 1000 and pool.bytes_in_use == 0
        with pytest.raises(ValueError, match="pageable"):
            device.module.copy_batch([target.data_ptr()], [address], [4], "kernel", 0)


def test_registration_ends_with_a_pool_that_nobody_closed() -> None:
    with emulated_device():
        tensor = torch.ones(1000)
        for _ in range(2):  # CUDA refuses to register what is registered
            PinnedPool(5000).register(tensor)


def test_a_mapped_file_can_be_registered(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows"
    path.write_bytes(bytes(range(256)) * 16)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        rows = torch.frombuffer(mapped, dtype=torch.uint8)
        with PinnedPool(4096) as pool:
            pool.register(rows, read_only=True)
            assert pool.bytes_in_use == 4096
        del rows


def test_registration_is_bound_by_the_budget(kind: str) -> None:
    with PinnedPool(1000) as pool:
        pool.register(torch.ones(200))
        with pytest.raises(PoolExhaustedError, match="400 bytes were asked for"):
            pool.register(torch.ones(100))
        assert pool.bytes_in_use == 800


def test_bad_registrations_are_refused(kind: str) -> None:
    tensor = torch.ones(100)
    pool = PinnedPool(1000)
    with pytest.raises(ValueError, match="contiguous"):
        pool.register(tensor[::2])
    pool.register(tensor)
    with pytest.raises(ValueError, match="registered with the pool already"):
        pool.register(tensor)
    pool.register(torch.empty(0))
    pool.close()
    with pytest.raises(PoolClosedError):
        pool.register(tensor)


def test_a_failed_registration_counts_nothing() -> None:
    with emulated_device() as device, PinnedPool(1000) as pool:
        tensor = torch.ones(100)
        device.fail_next("cudaHostRegister", "invalid value")
        with pytest.raises(CudaError, match="cudaHostRegister failed: cudaErrorInvalidValue"):
            pool.register(tensor)
        assert pool.bytes_in_use == 0
        pool.register(tensor)
        assert pool.bytes_in_use == 400


def test_waiting_for_no_copies_returns() -> None:
    wait_for_copies()
