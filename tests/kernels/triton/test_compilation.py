"""What Triton's compilers make of the kernels, for GPUs that are not here: they refuse more than numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes that one program can have at most."""
KERNELS = {
    "adapter_kernel",
    "_normalize_kernel",
    "_vector_kernel",
    "_store_words",
    "_lookup_kernel",
    "_append_kernel",
    "_attention_kernel",
    "_causal_merge_kernel",
    "_merge_kernel",
    "_product_kernel",
    "_weight_gradient_kernel",
}
SPILLED = {("_weight_gradient_kernel", None): 8}
"""Bytes that a kernel, with windows of so many tokens, may spill, 0 for all others: a few registers of the
weights' gradient in float16, whatever its tile. To be looked at on a GPU."""
SPILLED_BY_TRITON_3_6 = {("adapter_kernel", None): 8, ("_merge_kernel", 3): 168}
"""Triton 3.6 needs more registers for the same code than 3.9, which spills none of these: in the first tile
of the adapters, and in the merge of three types of rows, which then has all 255 that a thread can have."""


def compiled(target: str, directory: Path, *options: str) -> list[dict[str, Any]]:
    """Of ``compile_kernels.py``, in a process where Triton does not interpret, with a cache of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(directory)
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    script = Path(__file__).with_name("compile_kernels.py")
    finished = subprocess.run(
        [sys.executable, "-W", "ignore", script, target, *options],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    records: list[dict[str, Any]] = json.loads(finished.stdout)
    return records


@pytest.mark.slow
def test_compiles_with_tensor_cores_and_wide_reads(tmp_path: Path) -> None:
    records = compiled("sm_90", tmp_path)
    assert {record["kernel"] for record in records} == KERNELS
    allowed = SPILLED | (SPILLED_BY_TRITON_3_6 if triton_version() == (3, 6) else {})
    for record in records:
        assert record["spilled"] <= allowed.get((record["kernel"], record.get("window")), 0), record
        assert record["shared"] <= SHARED_MEMORY["sm_90"], record
        if record["kernel"] == "adapter_kernel":
            assert record["tensor_core"] and record["copy_16_bytes"], record
        if record["kernel"] in ("_product_kernel", "_weight_gradient_kernel"):
            assert record["tensor_core"], record
        if record["kernel"] == "_attention_kernel":
            assert record["tensor_core"], record
        if record["kernel"] in (
            "_causal_merge_kernel",
            "_merge_kernel",
            "_normalize_kernel",
            "_vector_kernel",
        ):
            assert record["read_16_bytes"], record
    for window in (2, 3):  # the whole row of a type in vectors: more types, more of these
        reads = [
            r["read_16_bytes"] for r in records if r["kernel"] == "_merge_kernel" and r["window"] == window
        ]
        assert reads[1] > reads[0] > window


def triton_version() -> tuple[int, int]:
    major, minor = metadata.version("triton").split(".")[:2]
    return int(major), int(minor)


@pytest.mark.slow
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_every_configuration_compiles(target: str, tmp_path: Path) -> None:
    """All that tuning tries, of which a GPU drops what does not fit: at least one must, without spilling."""
    records = compiled(target, tmp_path, "all")
    assert {record["kernel"] for record in records} == KERNELS
    shapes: dict[tuple[Any, ...], list[bool]] = {}
    for record in records:
        shape = tuple(record.get(key) for key in ("kernel", "dtype", "rank_block", "window"))
        fits = record["spilled"] == 0 and record["shared"] <= SHARED_MEMORY[target]
        shapes.setdefault(shape, []).append(fits)
        assert record["tf32"] == 0, record  # float32 stays float32
    for shape, fitting in shapes.items():
        assert any(fitting), shape
