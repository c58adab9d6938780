"""ldmatrix and mma against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from emulator.shim import floats, launch, shim


@pytest.mark.parametrize("by_halves", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products(dtype, by_halves):
    operands = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    with shim():
        output = launch(
            "multiply_" + str(dtype).removeprefix("torch."),
            np.zeros((16, 16), np.float32),
            operands.view(torch.int16).numpy(),
            by_halves,
        )
    left, right = operands.double().numpy()
    # 32 sums in float32, each wrong by at most half a unit in the last place of what has been summed up.
    bound = 32 * 2.0**-24 * 2 * (np.abs(left) @ np.abs(right))
    assert (np.abs(output - 2 * left @ right) <= bound).all()


def test_subnormals_infinities_and_nan():
    operands = torch.zeros(2, 16, 16, dtype=torch.float16)
    operands[0, :, 0] = 1.0
    operands[1, 0, :4] = torch.tensor([2.0**-24, 1e-6, float("inf"), float("nan")]).half()
    with shim():
        output = launch(
            "multiply_float16", np.zeros((16, 16), np.float32), operands.view(torch.int16).numpy()
        )
    np.testing.assert_array_equal(output, np.repeat(2 * operands[1, :1].double().numpy(), 16, axis=0))


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("misaligned_matrix", "tensor_core.cu:[0-9]+: a row's address is not a multiple of 16"),
        ("matrix_in_global", "tensor_core.cu:[0-9]+: a row is not in shared memory"),
    ],
)
def test_misuse_is_told(kernel, message):
    with shim(), pytest.raises(RuntimeError, match=message):
        launch(kernel, None, floats(128), 4)
