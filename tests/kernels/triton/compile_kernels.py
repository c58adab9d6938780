"""Compiles the Triton kernels for a GPU that is not there: ``compile_kernels.py sm_90 [all]`` prints JSON.

The package's own functions run on CPU tensors, on a driver that knows only its target and in a Triton whose
launches end after compiling, so that what is compiled is what a GPU would be given: types, specializations
and tuned configurations (the first of each; ``all`` of them). For each: registers, what was spilled, shared
memory, and how often instructions stand in the code that say what has become of it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)
os.environ["HMI_TRITON_TUNE"] = "1"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from hmi_kernels import causal
from hmi_kernels.adapters import BottleneckArguments, LoraArguments
from hmi_kernels.paged import PagedArguments
from hmi_kernels.plot import LookupArguments, MergeArguments
from hmi_kernels.products import ProductArguments, WeightGradientArguments
from hmi_kernels.triton import (
    adapters,
    causal_merge,
    paged_attention,
    plot_lookup,
    plot_merge,
    products,
    vectors,
)
from hmi_kernels.vectors import VectorArguments

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
INSTRUCTIONS = {
    "tensor_core": r"mma\.sync|wgmma\.mma_async|v_mfma",
    "tf32": r"tf32",
    "copy_16_bytes": r"cp\.async\.cg",
    "read_16_bytes": r"ld\.global[^;]*\.v4\.b32|(global|buffer)_load_dwordx4",
}


class TargetOnly(DriverBase):
    """A driver of a GPU that is not there."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0

    is_active = map_python_to_cpp_type = get_current_target = None  # type: ignore[assignment]
    get_active_torch_device = get_benchmarker = None  # type: ignore[assignment]


def facts(name: str, config: dict[str, Any], kernel: Any) -> dict[str, Any]:
    code = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
    counts = {key: len(re.findall(pattern, code)) for key, pattern in INSTRUCTIONS.items()}
    registers, spilled = cuda_usage(kernel.asm["cubin"]) if "cubin" in kernel.asm else hip_usage(code)
    usage = {"registers": registers, "spilled": spilled, "shared": kernel.metadata.shared}
    return {"kernel": name, "warps": kernel.metadata.num_warps, **config, **usage, **counts}


def cuda_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def hip_usage(code: str) -> tuple[int, int]:
    usage = {key: int(value) for key, value in re.findall(r"\.(vgpr_count|\w+_spill_count):\s+(\d+)", code)}
    return usage["vgpr_count"], usage["vgpr_spill_count"] + usage["sgpr_spill_count"]


def compile_only(records: list[dict[str, Any]], *, all_configs: bool) -> None:
    """Makes every launch end after compiling, and note what came out."""
    run = JITFunction.run

    def compile_one(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        config = {key: kwargs[key] for key in ("tile_rows", "rank_block", "block", "window") if key in kwargs}
        records.append({"dtype": str(args[0].dtype), **facts(self.__name__, config, kernel)})

    def compile_configs(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        configs = self.prune_configs(kwargs)
        for config in configs if all_configs else configs[:1]:
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    JITFunction.run, Autotuner.run = compile_one, compile_configs


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def run_adapters(dtype: torch.dtype, rank: int, num_tokens: int) -> None:
    size = 768
    states = torch.zeros(num_tokens, 3 * size, dtype=dtype)
    arena = torch.zeros(2**20, dtype=dtype)
    segments = (torch.tensor([0, num_tokens]), int32(0))
    norm = torch.ones(size, dtype=dtype)
    slots = (torch.tensor([0]), int32(rank))
    output, inputs = states[:, :size], states[:, size : 2 * size]
    shared = (output, inputs, arena, *segments, *slots)
    adapters.grouped_bottleneck(
        BottleneckArguments(*shared, int32(1), torch.ones(1), norm, norm, 1e-12, rank)
    )
    three = [torch.stack([table] * 3) for table in (*slots, torch.ones(1))]
    adapters.grouped_lora(
        LoraArguments(states, inputs.clone(), arena, *segments, *three, [size, size, size], rank)
    )


def run_products(dtype: torch.dtype, rank: int, num_tokens: int) -> None:
    size = 768
    rows, thin = torch.zeros(num_tokens, size, dtype=dtype), torch.zeros(num_tokens, rank, dtype=dtype)
    arena = torch.zeros(2**20, dtype=dtype)
    indexes = (torch.tensor([0, num_tokens]), int32(0), torch.tensor([0]), int32(size), int32(rank))
    products.grouped_product(ProductArguments(rows, arena, *indexes, rank))
    products.grouped_product(ProductArguments(thin, arena, *indexes, size, True))
    products.grouped_weight_gradient(WeightGradientArguments(rows, thin, *indexes, len(arena)))


def run_vectors_and_plot(dtype: torch.dtype) -> None:
    size = 768
    rows, vector = torch.zeros(64, size, dtype=dtype), torch.zeros(size, dtype=dtype)
    segments = (torch.tensor([0, 64]), int32(0))
    for function in (vectors.grouped_scale, vectors.grouped_bias):
        function(VectorArguments(rows, vector, *segments, torch.tensor([0])))
    ids = torch.zeros(64, dtype=torch.int32)
    index = torch.zeros(8, 2, dtype=torch.int64)
    for window in (2, 3):
        lookup = LookupArguments(ids, segments[0], [index] * 5, int32(0).view(1, 1), window)
        plot_lookup.plot_lookup(lookup)
        references = torch.zeros(64, 1 if window == 2 else 3, dtype=torch.int64)
        for types in ([torch.float16], [torch.float16, torch.float32, torch.int8]):
            tables = [torch.zeros(2, window, size, dtype=row_type) for row_type in types]
            scales = [torch.zeros(2, window) for _ in types]
            unigrams = [torch.zeros(9, 3, size, dtype=torch.float16)]
            merged = (ids, segments[0], references, tables, unigrams, int32(0), rows, vector, vector)
            plot_merge.plot_merge(MergeArguments(*merged, 1e-12, window, scales))


def run_decoding(dtype: torch.dtype) -> None:
    size, heads, block_size, count = 768, 12, 16, 8
    rows, vector = torch.zeros(count, 3 * size, dtype=dtype), torch.zeros(size, dtype=dtype)
    cache = torch.zeros(4, heads, size // heads, block_size, dtype=dtype)
    tables, lengths = torch.zeros(1, 4, dtype=torch.int32), torch.tensor([count])
    bounds = torch.tensor([0, count])
    paged_attention.paged_attention(
        PagedArguments(*rows.chunk(3, dim=1), cache, cache.transpose(2, 3), tables, bounds, lengths)
    )
    ids, places = torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int64)
    references = torch.zeros(count, 2, dtype=torch.int64)
    for row_type in (torch.float16, torch.int8):
        table, unigrams = (
            torch.zeros(2, 1, size, dtype=row_type),
            torch.zeros(9, 1, size, dtype=torch.float16),
        )
        merged = (ids, places, references, [table], [unigrams], ids, rows[:, :size].contiguous())
        causal_merge.causal_merge(causal.MergeArguments(*merged, vector, vector, 1e-5, [torch.zeros(2, 1)]))


def main(target: str, *, all_configs: bool) -> None:
    driver.set_active(TargetOnly(TARGETS[target]))
    records: list[dict[str, Any]] = []
    compile_only(records, all_configs=all_configs)
    for dtype in (torch.float16, torch.bfloat16, torch.float32) if all_configs else (torch.float16,):
        for rank in (16, 64, 256) if all_configs else (64,):
            run_adapters(dtype, rank, 128)
            run_products(dtype, rank, 128)
        run_vectors_and_plot(dtype)
        run_decoding(dtype)
    print(json.dumps(records))


if __name__ == "__main__":
    main(sys.argv[1], all_configs="all" in sys.argv[2:])
