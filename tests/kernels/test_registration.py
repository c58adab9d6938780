"""The ops as torch sees them, the backends, and what a person can ask of the build."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import hmi_kernels
from hmi_kernels import _C
from hmi_kernels.native import native

ROOT = Path(__file__).parents[2]


def int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def op_calls() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    ids, offsets = int32([1, 2, 1, 2, 3]), torch.tensor([0, 3, 5])
    keys = hmi_kernels.ngram_keys(int32([[1, 2, -1], [2, 3, -1]]))
    index = hmi_kernels.plot_index_build(keys)
    chains = int32([[0], [0]])
    references = hmi_kernels.plot_lookup(ids, offsets, [index], chains, window=2)
    tables = [torch.randn(2, 2, 6).half()], [torch.randn(4, 3, 6)]
    slots = torch.tensor([0]), int32([2])
    adapter = (torch.zeros(5, 6), torch.randn(5, 6), torch.randn(99), torch.tensor([0, 5]), int32([0]))
    norm = torch.randn(3, 6), torch.ones(6), torch.zeros(6)
    rows = tuple(torch.randn(5, 6) for _ in range(3))
    segments = adapter[3:]
    trained = (torch.randn(5, 6, requires_grad=True), torch.randn(99, requires_grad=True), *segments)
    matrices = (torch.tensor([3]), int32([6]), int32([4]))
    sides = (torch.randn(5, 6, requires_grad=True), torch.randn(5, 4, requires_grad=True))
    per_projection = tuple(table[None] for table in (*slots, torch.ones(1)))
    causal = hmi_kernels.causal_lookup(int32([[1, 2, -1], [3, -1, -1]]), [index], chains[:1], int32([0, 0]))
    caches = torch.zeros(3, 2, 3, 4), torch.zeros(3, 2, 4, 3)
    blocks = int32([[2], [0]]), offsets, torch.tensor([4, 2])
    return {
        "causal_lookup": ((int32([[1, 2, -1], [3, -1, -1]]), [index], chains[:1], int32([0, 0])), {}),
        "causal_merge": (
            (
                int32([2, 3]),
                torch.tensor([1, 0]),
                causal,
                [torch.randn(2, 1, 6)],
                [torch.randn(4, 1, 6)],
                int32([0, 0]),
                *norm,
            ),
            {"layer_norm_eps": 1e-5, "row_scales": [], "codebooks": []},
        ),
        "paged_attention": ((*rows, *caches, *blocks), {}),
        "packed_attention": ((*rows, offsets, offsets), {"num_heads": 2}),
        "count_ngrams": ((ids, offsets), {"order": 2}),
        "plot_index_build": ((keys,), {}),
        "plot_index_insert": ((torch.zeros(8, 2, dtype=torch.int64), keys, torch.tensor([5, 6])), {}),
        "plot_index_find": ((index, keys), {}),
        "plot_lookup": ((ids, offsets, [index], chains), {"window": 2}),
        "plot_merge": (
            (ids, offsets, references, *tables, int32([0, 0]), *norm),
            {"layer_norm_eps": 1e-5, "window": 2, "row_scales": [], "codebooks": []},
        ),
        "grouped_bottleneck": (
            (*adapter, *slots, int32([1]), torch.ones(1)),
            {"layer_norm_weight": torch.ones(6), "layer_norm_bias": torch.zeros(6), "max_rank": 8},
        ),
        "grouped_lora": ((*adapter, *slots, torch.ones(1)), {}),
        "grouped_bottleneck_delta": ((*trained, *slots, int32([1]), torch.ones(1)), {"max_rank": 2}),
        "grouped_lora_delta": ((*trained, *per_projection), {"output_sizes": [7], "max_rank": 2}),
        "grouped_product": ((*trained, *matrices), {"output_size": 5}),
        "grouped_weight_gradient": ((*sides, *segments, *matrices), {"arena_size": 99}),
        "grouped_scale": ((*adapter[1:], slots[0]), {}),
        "grouped_bias": ((*adapter[1:], slots[0]), {}),
    }


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", op_calls())
def test_opcheck(name: str, backend: str) -> None:
    args, kwargs = op_calls()[name]
    with hmi_kernels.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.hmi, name).default, args, kwargs)


@pytest.mark.parametrize("name", op_calls())
def test_public_function_and_reference_take_the_arguments_of_the_op(name: str) -> None:
    schema = [argument.name for argument in getattr(torch.ops.hmi, name).default._schema.arguments]
    assert list(inspect.signature(getattr(hmi_kernels, name)).parameters) == schema
    assert list(inspect.signature(getattr(hmi_kernels.reference, name)).parameters) == schema


def test_backends_say_why_not() -> None:
    status = hmi_kernels.backends()
    assert list(status) == ["cuda", "triton", "cpu", "reference"]
    assert all(bool(entry.reason) != entry.available for entry in status.values())
    assert status["cpu"].available and status["reference"].available
    for name, entry in status.items():
        if not entry.available:
            with pytest.raises(ValueError, match=re.escape(entry.reason)):
                hmi_kernels.use_backend(name)
    with pytest.raises(ValueError, match="cudaa"):
        hmi_kernels.use_backend("cudaa")


def test_use_backend_is_a_setter_and_a_context() -> None:
    assert hmi_kernels.active_backend() == "cpu"
    with hmi_kernels.use_backend("reference"):
        assert hmi_kernels.active_backend() == "reference"
        with hmi_kernels.use_backend("cpu"):
            assert hmi_kernels.active_backend() == "cpu"
        assert hmi_kernels.active_backend() == "reference"
    hmi_kernels.use_backend("reference")
    assert hmi_kernels.active_backend() == "reference"
    hmi_kernels.use_backend("auto")
    assert hmi_kernels.active_backend() == "cpu"
    with hmi_kernels.use_backend("cpu"), pytest.raises(ValueError, match="on cuda"):
        hmi_kernels.active_backend("cuda")


def test_build_info_tells_what_runs() -> None:
    info = hmi_kernels.build_info()
    assert info["compiled"] and info["reason"] == ""
    assert info["simd_compiled"][0] == "portable"
    assert set(info["simd_available"]) <= set(info["simd_compiled"])
    assert info["simd_active"] == info["simd_available"][-1]
    assert info["threads_mode"] in ("pool", "openmp")
    assert info["num_threads"] == torch.get_num_threads()


def test_a_level_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="SIMD level sse9 is not to be had"):
        native.set_simd_level("sse9")
    with pytest.raises(ValueError, match="auto, pool or openmp"):
        native.set_threads_mode("many")


def test_stub_says_what_the_module_has() -> None:
    stub = ast.parse((ROOT / "hmi_kernels" / "_C.pyi").read_text())
    functions = {node.name: node for node in stub.body if isinstance(node, ast.FunctionDef)}
    attributes = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}  # type: ignore[union-attr]
    classes = {node.name for node in stub.body if isinstance(node, ast.ClassDef)}
    described = {*functions, *attributes, *classes} - (set() if native.with_cuda else {"cuda"})
    assert {name for name in dir(_C) if not name.startswith("_")} == described
    for name, node in functions.items():
        # pybind11 writes the signature into the first line: name(argument: type, ...) -> type
        first_line = getattr(_C, name).__doc__.splitlines()[0]
        assert re.findall(r"(\w+): ", first_line) == [argument.arg for argument in node.args.args], name


def test_public_names_are_there_and_described() -> None:
    for name in hmi_kernels.__all__:
        value = getattr(hmi_kernels, name)
        assert not inspect.isroutine(value) or value.__doc__, name


def test_simd_files_instantiate_nothing_of_the_library() -> None:
    """What they instantiate of a shared template, the linker might choose for machines that cannot run it."""
    allowed = {"stdint.h", "immintrin.h", "arm_neon.h"}
    folder = ROOT / "csrc" / "cpu" / "simd"
    sources = [path for path in folder.iterdir() if not path.name.startswith("dispatch")]
    assert sources
    for path in sources:
        text = path.read_text()
        assert set(re.findall(r"#include <(.*)>", text)) <= allowed, path.name
        assert "std::" not in text, path.name


def test_only_the_bindings_know_python() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".h", ".cpp", ".inl", ".cu", ".cuh") and path.parent.name != "bindings":
            assert not re.search(r"pybind|Python\.h|torch/", path.read_text()), path.name
