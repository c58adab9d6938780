"""The ops as torch's compiler sees them when the CUDA kernels run them: schema, mutation, fake tensors."""

from __future__ import annotations

import pytest
import torch
from emulator.device_choice import require_direct_calls
from emulator.harness import emulated
from kernels.cuda.adapter_cases import make_case
from torch import Tensor

import hmi_kernels


def plot_arguments() -> tuple[tuple[object, ...], dict[str, object]]:
    ids = torch.tensor([1, 2, 1, 2, 3], dtype=torch.int32)
    offsets, no_domain = torch.tensor([0, 3, 5]), torch.zeros(2, dtype=torch.int32)
    references = torch.tensor([[0], [-1], [-1], [1], [-1]])
    half = torch.float16
    tables = [torch.randn(2, 2, 256).to(half)], [torch.randn(4, 3, 256).to(half)]
    norm = torch.randn(3, 256).to(half), torch.ones(256, dtype=half), torch.zeros(256, dtype=half)
    arguments = (ids, offsets, references, *tables, no_domain, *norm)
    return arguments, {"layer_norm_eps": 1e-5, "window": 2, "row_scales": [], "codebooks": []}


def adapter_arguments(kind: str) -> tuple[tuple[object, ...], dict[str, object]]:
    columns = {"activations": ["gelu"] * 3} if kind == "bottleneck" else {"output_sizes": [256]}
    case = make_case([3, 0, 20], **columns)
    tables = [table[0] for table in (case.slot_offsets, case.slot_ranks)]
    shared = (case.output, case.hidden_states, case.arena, case.segment_offsets, case.segment_slots, *tables)
    extra = (case.slot_activations,) if case.slot_activations is not None else ()
    return (*shared, *extra, case.slot_scales[0]), {}


@pytest.mark.parametrize("name", ["grouped_bottleneck", "grouped_lora", "plot_merge"])
def test_opcheck(name: str) -> None:
    require_direct_calls("opcheck")
    kind = name.removeprefix("grouped_")
    args, kwargs = plot_arguments() if name == "plot_merge" else adapter_arguments(kind)
    with emulated():
        torch.library.opcheck(getattr(torch.ops.hmi, name).default, args, kwargs)


def test_compiled_function_equals_eager() -> None:
    require_direct_calls("torch.compile")
    args, _ = adapter_arguments("lora")
    output, hidden_states, *rest = args

    def add_adapter(output: Tensor, hidden_states: Tensor) -> Tensor:
        changed = output * 2
        hmi_kernels.grouped_lora(changed, hidden_states, *rest)
        return changed.relu()

    compiled = torch.compile(add_adapter, fullgraph=True, backend="aot_eager")
    with emulated():
        assert torch.equal(compiled(output, hidden_states), add_adapter(output, hidden_states))
