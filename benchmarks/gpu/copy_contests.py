"""Copies to the device: page-locked and pageable, one by one and batched, alone and beside compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.contest import Contender, Contest, Entry, Planned
from benchmarks.gpu.costs import copy_cost
from benchmarks.gpu.platform import Platform
from benchmarks.gpu.timing import measure_seconds
from benchmarks.result import Quantity
from hmi_kernels.copies import copy_batch_async
from hmi_kernels.pinned_pool import PinnedPool

__all__ = ["copy_contests", "measure_overlap"]

KIB, MIB = 1 << 10, 1 << 20
PIECES = ((4 * KIB, 2048), (64 * KIB, 1024), (MIB, 64), (16 * MIB, 4))
"""Bytes of a piece, pieces of a call."""
QUICK_PIECES = PIECES[1:2]
DRY_PIECES = ((4 * KIB, 3), (100, 2))
METHODS = {
    "auto": "the method that the table of csrc/cuda/copy_batch.cu chooses",
    "loop": "a cudaMemcpyAsync for each piece",
    "batch": "one cudaMemcpyBatchAsync",
    "kernel": "a kernel reads the pieces in host memory",
}
OVERLAP_PIECES = (MIB, 256)
PRODUCT_SIZE = 4096


def copy_contests(platform: Platform, *, is_quick: bool) -> list[Planned]:
    """A case for each size of pieces."""
    chosen = DRY_PIECES if platform.is_dry else QUICK_PIECES if is_quick else PIECES
    return [Planned(_name(*pieces), partial(_contest, *pieces, platform)) for pieces in chosen]


def _name(piece_bytes: int, num_pieces: int) -> str:
    size = f"{piece_bytes // KIB} KiB" if piece_bytes >= KIB else f"{piece_bytes} bytes"
    return f"copies to the device: {num_pieces} pieces of {size}"


class _Pieces:
    """Pieces of one page-locked buffer, and where they go: places in device memory with gaps between them."""

    def __init__(self, piece_bytes: int, num_pieces: int, platform: Platform) -> None:
        self.pool = PinnedPool(2 * piece_bytes * num_pieces + MIB)
        self.pinned = self.pool.empty((num_pieces, piece_bytes), torch.uint8)
        self.pinned.random_(0, 256)
        self.pageable = self.pinned.clone()
        self.expected = self.pinned.to(platform.device)
        stride = piece_bytes + 256
        memory = platform.device_bytes(num_pieces * stride)
        self.targets = memory.view(num_pieces, stride)[:, :piece_bytes]
        self.whole = platform.device_bytes(num_pieces * piece_bytes).view(num_pieces, piece_bytes)


def _contest(piece_bytes: int, num_pieces: int, platform: Platform) -> Contest:
    pieces = _Pieces(piece_bytes, num_pieces, platform)
    stream = platform.new_stream() if platform.is_dry else None  # None: the one that the benchmark runs on

    def ours(method: str) -> Callable[[], object]:
        targets, sources = list(pieces.targets), list(pieces.pinned)
        return lambda: copy_batch_async(targets, sources, stream=stream, method=method)

    def theirs(source: Tensor) -> Callable[[], object]:
        pairs = list(zip(pieces.targets, source, strict=True))
        return lambda: [target.copy_(part, non_blocking=True) for target, part in pairs]

    def contender(name: str, description: str, call: Callable[[], object], target: Tensor) -> Contender:
        def result() -> Tensor:
            target.zero_()
            call()
            platform.synchronize()
            return target

        return Contender(
            name,
            description,
            lambda: Entry(call, result),
            is_ours=name.startswith("hmi"),
            can_be_captured=False,
        )

    contenders = [
        contender(f"hmi copy_batch_async, {method}", what, ours(method), pieces.targets)
        for method, what in METHODS.items()
    ]
    contenders += [
        contender("torch, pinned", "a copy_ for each piece", theirs(pieces.pinned), pieces.targets),
        contender("torch, pageable", "a copy_ for each piece", theirs(pieces.pageable), pieces.targets),
        contender(
            "torch, one piece",
            "as many bytes, pinned, in one copy_: what the bus gives",
            lambda: pieces.whole.copy_(pieces.pinned, non_blocking=True),
            pieces.whole,
        ),
    ]
    return Contest(
        family="copies",
        name=_name(piece_bytes, num_pieces),
        settings={"piece_bytes": piece_bytes, "pieces": num_pieces},
        cost=copy_cost([piece_bytes] * num_pieces),
        bound=0.0,
        expected=lambda: pieces.expected,
        contenders=contenders,
        is_on_roofline=False,
    )


def measure_overlap(platform: Platform) -> tuple[Quantity, ...]:
    """How much of the copies' time a stream of matrix products beside them hides, for each method."""
    if platform.is_dry:
        return ()
    pieces = _Pieces(*OVERLAP_PIECES, platform)
    sources = list(pieces.pinned)
    copy_stream = torch.cuda.Stream(platform.device)
    shape = (PRODUCT_SIZE, PRODUCT_SIZE)
    left, right = (torch.randn(shape, device=platform.device, dtype=torch.bfloat16) for _ in range(2))

    def copy(method: str) -> None:
        main = torch.cuda.current_stream()
        copy_stream.wait_stream(main)
        copied = copy_batch_async(list(pieces.targets), sources, stream=copy_stream, method=method)
        copied.wait(main)

    copies = {method: measure_seconds(partial(copy, method)) for method in METHODS if method != "auto"}
    products = max(1, round(min(copies.values()) / measure_seconds(lambda: left @ right)))

    def compute() -> None:
        for _ in range(products):
            torch.mm(left, right)

    def both(method: str) -> None:
        main = torch.cuda.current_stream()
        copy_stream.wait_stream(main)
        copied = copy_batch_async(list(pieces.targets), sources, stream=copy_stream, method=method)
        compute()
        copied.wait(main)

    computing = measure_seconds(compute)
    return tuple(
        Quantity(
            name=f"copies hidden behind products, method {method}",
            value=(alone + computing - measure_seconds(partial(both, method))) / min(alone, computing),
            unit="share",
        )
        for method, alone in copies.items()
    )
