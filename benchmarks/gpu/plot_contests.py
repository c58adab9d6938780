"""PLOT look-up and merge beside torch, and rows on the device beside rows in pinned host memory."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

import hmi_kernels
from benchmarks.gpu.agreement import largest_error
from benchmarks.gpu.contest import Contender, Contest, Entry, Planned
from benchmarks.gpu.plot_problem import LAYER_NORM_EPS, ROW_MASK, PlotProblem, PlotShape
from benchmarks.peers.torch_plot import TorchLookup, TorchMerge

__all__ = ["PLOT_SHAPES", "plot_contests"]

HALF, INT8 = torch.float16, torch.int8
PLOT_SHAPES = (
    PlotShape(2, 768, HALF, 128, 64, 150_000, 30_522),
    PlotShape(3, 768, HALF, 128, 64, 150_000, 30_522),
    PlotShape(2, 384, HALF, 128, 64, 150_000, 30_522),
    PlotShape(2, 768, INT8, 128, 64, 150_000, 30_522),
    PlotShape(2, 4096, HALF, 64, 64, 100_000, 30_522),
    PlotShape(2, 768, HALF, 32, 1, 150_000, 30_522),
)
QUICK_SHAPES = PLOT_SHAPES[:1]
DRY_SHAPES = (PlotShape(2, 256, HALF, 3, 5, 40, 12), PlotShape(3, 256, INT8, 2, 6, 40, 6))


def plot_contests(device: torch.device, *, is_dry: bool, is_quick: bool) -> list[Planned]:
    """A look-up and a merge for each shape."""
    shapes = DRY_SHAPES if is_dry else QUICK_SHAPES if is_quick else PLOT_SHAPES
    planned = []
    for shape in shapes:
        planned.append(Planned(_name("lookup", shape), partial(_lookup_contest, shape, device)))
        planned.append(Planned(_name("merge", shape), partial(_merge_contest, shape, device)))
    return planned


def _name(family: str, shape: PlotShape) -> str:
    what = f"plot_{family}: window {shape.window}, {shape.num_sequences} x {shape.length} tokens"
    if family == "lookup":
        return f"{what}, {shape.num_rows:,} rows"
    return f"{what}, hidden {shape.hidden_size}, {str(shape.row_type).removeprefix('torch.')} rows"


def _settings(shape: PlotShape) -> dict[str, str | int]:
    return {**vars(shape), "row_type": str(shape.row_type), "tokens": shape.num_tokens}


def _lookup_contest(shape: PlotShape, device: torch.device) -> Contest:
    problem = PlotProblem(shape, device)

    def ours() -> Entry:
        return Entry(problem.lookup, lambda: _comparable(problem.lookup()))

    def peer() -> Entry:
        search = TorchLookup(problem.keys, problem.key_references, problem.batch, window=shape.window)
        return Entry(search.run, lambda: _comparable(search.run()))

    return Contest(
        family="lookup",
        name=_name("lookup", shape),
        settings={**_settings(shape)},
        cost=problem.lookup_cost,
        bound=0.0,
        expected=lambda: _comparable(problem.references),
        contenders=[
            Contender("hmi cuda plot_lookup", "a chain of two hash tables, one launch", ours, is_ours=True),
            Contender("hmi triton plot_lookup", "the same", ours, backend="triton", is_ours=True),
            Contender(TorchLookup.name, TorchLookup.description, peer),
        ],
    )


def _comparable(references: Tensor) -> Tensor:
    """Tables and rows apart: each is small enough to be exact as float32."""
    rows = torch.where(references >= 0, references & ROW_MASK, -1)
    return torch.stack([references >> hmi_kernels.ROW_BITS, rows])


def _merge_contest(shape: PlotShape, device: torch.device) -> Contest:
    problem = PlotProblem(shape, device)

    def on_device() -> Entry:
        return _merge_entry(problem, problem.rows, problem.unigrams, problem.scales)

    def in_host_memory() -> Entry:
        rows, scales = ([_pinned(part) for part in parts] for parts in (problem.rows, problem.scales))
        return _merge_entry(problem, rows, _pinned(problem.unigrams), scales)

    def peer() -> Entry:
        norm = problem.positions, problem.norm_weight, problem.norm_bias, LAYER_NORM_EPS
        merge = TorchMerge(problem.places, problem.all_rows, problem.unigrams, problem.batch, norm)
        return Entry(merge.run, merge.run)

    name, in_place = "hmi cuda plot_merge", "rows read in place in host memory"
    contenders = [
        Contender(name, "one launch, rows on the device", on_device, is_ours=True),
        Contender(f"{name}, pinned rows", in_place, in_host_memory, is_ours=True),
        Contender("hmi triton plot_merge", "rows on the device", on_device, backend="triton", is_ours=True),
    ]
    if shape.row_type is not INT8:
        contenders.append(Contender(TorchMerge.name, TorchMerge.description, peer))
    return Contest(
        family="merge",
        name=_name("merge", shape),
        settings={**_settings(shape)},
        cost=problem.merge_cost,
        bound=largest_error(torch.float16),
        expected=problem.expected_states,
        contenders=contenders,
    )


def _merge_entry(problem: PlotProblem, rows: list[Tensor], unigrams: Tensor, scales: list[Tensor]) -> Entry:
    def call() -> Tensor:
        return problem.merge(rows, unigrams, scales)

    return Entry(call, call)


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.cpu().pin_memory() if tensor.is_cuda else tensor
