"""Mutants: a changed line is compiled, and only what includes it."""

from __future__ import annotations

import pytest

from emulator.build import EMULATOR_TESTS
from emulator.harness import run_python
from emulator.mutants import Mutation, build_mutant, run_mutated

KERNELS = "tests/emulator/kernels/meetings.cu"
CODE = """
import numpy as np
from emulator.shim import floats, launch, shim
with shim():
    output = launch("reverse", np.zeros(128, np.float32), floats(128))
assert np.array_equal(output, floats(128)[::-1]), "wrong"
"""


def test_a_mutant_is_what_runs():
    mutation = Mutation(
        KERNELS, "values[kThreads - 1 - threadIdx.x];\n}\n\n// Rounds", "1.0f;\n}\n\n// Rounds"
    )
    assert run_python(CODE).returncode == 0
    result = run_mutated(CODE, mutation, program=EMULATOR_TESTS)
    assert result.stderr.strip().endswith("AssertionError: wrong")


def test_text_that_is_not_there_once_is_refused():
    with pytest.raises(ValueError, match=r"'__syncthreads' is \d+ times in tests/emulator/kernels"):
        build_mutant(Mutation(KERNELS, "__syncthreads", ""), program=EMULATOR_TESTS)
    with pytest.raises(ValueError, match="is 0 times"):
        build_mutant(Mutation(KERNELS, "no such text", ""), program=EMULATOR_TESTS)
