"""The detour over which tests of CPU tensors reach the kernels of a GPU, here through memory of the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hmi_kernels
from emulator.staging import ALIGNMENT, HOST_OPS, STAGED_OPS, Staged, StagedStorages

CPU = torch.device("cpu")


def add_bias(output: Tensor, arena: Tensor, *, slot: int = 0) -> None:
    offsets = torch.tensor([0, 2, len(output)])
    hmi_kernels.grouped_bias(
        output, arena, offsets, torch.tensor([slot, -1], dtype=torch.int32), torch.tensor([8])
    )


def test_what_an_op_writes_comes_back_and_nothing_else_changes() -> None:
    wide, arena = torch.zeros(3, 32), torch.arange(24.0)
    with Staged(CPU), hmi_kernels.use_backend("reference"):
        add_bias(wide[:, 8:16], arena[4:])
    expected = torch.zeros(3, 32)
    expected[:2, 8:16] = torch.arange(12.0, 20.0)
    assert torch.equal(wide, expected)
    assert torch.equal(arena, torch.arange(24.0))


def test_views_of_one_storage_stay_views_of_one_copy() -> None:
    wide = torch.randn(5, 40, dtype=torch.float16)
    first, second = wide[:, 8:16], wide[1:3, 3:39:2]
    staged = StagedStorages(CPU)
    copies = [staged.on_device(view) for view in (first, second)]
    for copy, view in zip(copies, (first, second), strict=True):
        assert torch.equal(copy, view) and copy.stride() == view.stride()
        assert copy.data_ptr() % ALIGNMENT == view.data_ptr() % ALIGNMENT
        assert copy.data_ptr() != view.data_ptr()
    copies[0].fill_(1)
    assert torch.equal(wide[:, 8:16] == 1, torch.zeros(5, 8, dtype=torch.bool))
    staged.write_back([second])
    assert bool((wide[:, 8:16] == 1).all())


def test_errors_pass() -> None:
    with (
        Staged(CPU),
        hmi_kernels.use_backend("reference"),
        pytest.raises(ValueError, match="segment_slots"),
    ):
        add_bias(torch.zeros(3, 8), torch.zeros(24), slot=7)


def test_other_ops_stay_where_they_are() -> None:
    tensor = torch.ones(3)
    with Staged(torch.device("meta")):
        assert torch.equal(tensor + 1, torch.full((3,), 2.0))


def test_every_op_is_known() -> None:
    """Whoever adds one says whether it makes the detour."""
    names = [name.split(".")[0] for name in torch._C._dispatch_get_all_op_names()]
    assert {name for name in names if name.startswith("hmi::")} == STAGED_OPS | HOST_OPS
    assert not STAGED_OPS & HOST_OPS


def test_an_unknown_op_is_refused() -> None:
    with torch.library._scoped_library("hmi", "FRAGMENT") as library:
        library.define("not_yet_known(Tensor x) -> Tensor")
        library.impl("not_yet_known", lambda x: x + 1, "CPU")
        with Staged(CPU), pytest.raises(NotImplementedError, match="hmi::not_yet_known must be in"):
            torch.ops.hmi.not_yet_known(torch.ones(1))


def test_the_backend_cpu_makes_no_detour() -> None:
    """Its calls would not bear one: nothing can be copied back from a meta tensor."""
    rows, arena = torch.zeros(3, 8), torch.arange(24.0)
    with Staged(torch.device("meta")):
        with hmi_kernels.use_backend("cpu"):
            add_bias(rows, arena)
        with hmi_kernels.use_backend("reference"), pytest.raises(NotImplementedError, match="meta"):
            add_bias(torch.zeros(3, 8), arena)
    assert torch.equal(rows[:2], torch.arange(8.0, 16.0).expand(2, 8))
