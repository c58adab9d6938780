"""What nvcc made of the kernels: nothing spilled, tensor cores in use. Needs a build with CUDA, not a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from kernels.cuda.compiled_facts import rows_of

import hmi_kernels
from benchmarks.gpu import compiled
from benchmarks.gpu.compiled import Kernel, describe_kernels, missing_instructions, spilled


@pytest.fixture(scope="module")
def built() -> tuple[str, Path]:
    """cuobjdump and the compiled module."""
    try:
        binary = compiled.compiled_module()
    except RuntimeError as reason:
        pytest.skip(str(reason))
    if (cuobjdump := compiled.find_cuobjdump()) is None:
        pytest.skip("cuobjdump is neither in CUDA_HOME nor in triton's package")
    return cuobjdump, binary


def test_no_kernel_keeps_anything_in_slow_memory(built: tuple[str, Path]) -> None:
    kernels = describe_kernels(*built)
    families = {kernel.name.split("<")[0] for kernel in kernels}
    assert {"adapter_tiles_kernel", "fused_kernel", "plot_merge_kernel", "gather_pieces"} <= families
    compiled_for = str(hmi_kernels.build_info()["cuda_architectures"]).split()
    expected = {f"sm_{number.removesuffix('+PTX').replace('.', '')}" for number in compiled_for}
    assert expected == {kernel.architecture for kernel in kernels}
    assert not spilled(kernels)


def test_blocks_fit_the_registers_of_a_multiprocessor(built: tuple[str, Path]) -> None:
    """64 Ki registers: two blocks of the 256 threads of a GEMV need 128 a thread at most."""
    names = "fused_kernel", "shrink_kernel", "expand_kernel"
    gemv = [kernel for kernel in describe_kernels(*built) if kernel.name.startswith(names)]
    assert gemv and max(kernel.registers for kernel in gemv) <= 128


@pytest.mark.slow
def test_tiles_use_tensor_cores_and_asynchronous_copies(built: tuple[str, Path]) -> None:
    assert not missing_instructions(*built)


USAGE = """
Fatbin elf code:
================
arch = sm_80

Resource usage:
 Function _Z1av:
  REG:40 STACK:8 SHARED:128 LOCAL:4 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function b:
  REG:20 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90
 Function b:
  REG:22 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:432 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = sm_90
		Function : adapter_tiles_kernel_a
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                       /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 LDGSTS.E.BYPASS.128 [R5], [R2.64] ;          /* 0x0000000000007918 */
        /*0020*/                   HMMA.16816.F32 R4, R8, R2, R4 ;              /* 0x0000000802047 */
		Function : other_kernel
        /*0000*/                   LDSM.16.M88.4 R4, [R2] ;                     /* 0x0000000802047 */
"""


def test_reading_cuobjdump(tmp_path: Path) -> None:
    """By a program that prints what cuobjdump prints."""
    program = tmp_path / "cuobjdump"
    for name, text in (("sass", SASS), ("usage", USAGE)):
        (tmp_path / name).write_text(text)
    program.write_text('#!/bin/sh\nif [ $1 = --dump-sass ]; then cat "$2/sass"; else cat "$2/usage"; fi\n')
    program.chmod(0o755)
    kernels = describe_kernels(str(program), tmp_path)
    assert [kernel.name for kernel in kernels][1:] == ["b", "b"]
    assert kernels[0][2:] == (40, 8, 128, 4) and kernels[2] == Kernel("sm_90", "b", 22, 0, 1024, 0)
    assert len(spilled(kernels)) == 1 and "8 bytes of stack and 4 of local" in spilled(kernels)[0]
    assert missing_instructions(str(program), tmp_path) == ["adapter_tiles_kernel_a for sm_90 lacks LDSM"]


def test_rows_group_template_arguments() -> None:
    kernels = [
        Kernel("sm_90", "k<__half, 1>", 30, 0, 0, 0),
        Kernel("sm_90", "k<float, 2>", 40, 0, 0, 0),
        Kernel("sm_80", "k<float, 2>", 41, 0, 1152, 16),
    ]
    assert rows_of(kernels) == [
        "| `k` | sm_80 | 1 shape | 41 | 1,152 B | 16 B |",
        "| `k` | sm_90 | 2 shapes | 30 to 40 | 0 B | 0 B |",
    ]
