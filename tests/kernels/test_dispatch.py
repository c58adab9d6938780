"""Who runs an op: by choice, by its tensors, by what a backend refuses; and what is checked before that."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import hmi_kernels
from hmi_kernels import vectors
from hmi_kernels.adapters import BottleneckArguments, LoraArguments
from hmi_kernels.cuda import adapters as cuda_adapters
from hmi_kernels.cuda import driver
from hmi_kernels.cuda import vectors as cuda_vectors
from hmi_kernels.cuda.segments import misaligned
from hmi_kernels.library import _require_one_device
from hmi_kernels.vectors import VectorArguments


def int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def lora(dtype: torch.dtype = torch.float16, **changes: Any) -> LoraArguments:
    arguments = LoraArguments(
        output=torch.zeros(6, 256, dtype=dtype),
        hidden_states=torch.ones(6, 256, dtype=dtype),
        arena=torch.ones(512 * 8 * 2, dtype=dtype),
        segment_offsets=torch.tensor([0, 2, 6]),
        segment_slots=int32([0, 1]),
        slot_offsets=torch.tensor([0, 512 * 8]),
        slot_ranks=int32([8, 8]),
        slot_scales=torch.ones(2),
    )
    return arguments._replace(**changes)


def bottleneck(**changes: Any) -> BottleneckArguments:
    shared = lora()
    arguments = BottleneckArguments(
        *shared[:7], slot_activations=int32([0, 1]), slot_scales=shared.slot_scales
    )
    return arguments._replace(arena=torch.ones(512 * 8 * 2 + 600, dtype=torch.float16), **changes)


class RecordingModule:
    """Stands for ``_C.cuda``: remembers what would have been launched."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.capabilities: list[tuple[int, int]] = []

    def max_shared_bytes(self, device: int) -> int:
        return 163 * 1024

    def compute_capability(self, device: int) -> tuple[int, int]:
        return self.capabilities[device]

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.launches.append(name)


@pytest.fixture
def real_module(monkeypatch: pytest.MonkeyPatch) -> RecordingModule:
    """Nothing can be launched; tensors of a device, here torch's ``meta``, have no values to look at."""
    module = RecordingModule()
    monkeypatch.setattr(driver, "_module", driver._Module(module, False))
    return module


def test_half_floats_on_the_cpu_go_to_the_reference() -> None:
    arguments = lora()
    expected = lora(dtype=torch.float32)
    hmi_kernels.grouped_lora(*arguments[:8])
    hmi_kernels.grouped_lora(*expected[:8])
    torch.testing.assert_close(arguments.output.float(), expected.output, rtol=1e-3, atol=0)


def test_a_chosen_backend_says_what_it_refuses() -> None:
    with (
        hmi_kernels.use_backend("cpu"),
        pytest.raises(
            ValueError, match=r"backend cpu cannot run hmi::grouped_lora: output must be torch.float32"
        ),
    ):
        hmi_kernels.grouped_lora(*lora()[:8])


def test_backends_that_are_not_there_cannot_be_chosen() -> None:
    for name in ("cuda", "triton"):
        if not hmi_kernels.backends()[name].available:
            with pytest.raises(ValueError, match=name):
                hmi_kernels.use_backend(name)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("segment_offsets", torch.tensor([0, 3, 2])),
        ("segment_offsets", torch.tensor([0, 2, 7])),
        ("segment_slots", int32([0, 2])),
        ("segment_slots", int32([-2, 0])),
        ("slot_offsets", torch.tensor([0, 10**9])),
        ("slot_offsets", torch.tensor([4, 512 * 8])),
        ("slot_ranks", int32([8, 12])),
        ("slot_ranks", int32([264, 8])),
    ],
)
def test_values_in_host_memory_are_checked_before_a_launch(
    real_module: RecordingModule, field: str, value: Tensor
) -> None:
    rows = torch.zeros(6, 256, dtype=torch.float16, device="meta")
    changes = {"output": rows, "hidden_states": rows, field: value}
    with pytest.raises(ValueError, match=field):
        cuda_adapters.LORA.run(lora(**changes))
    with pytest.raises(ValueError, match=field):
        cuda_adapters.BOTTLENECK.run(bottleneck(**changes))
    if field != "slot_ranks":
        arguments = VectorArguments(rows, *bottleneck()[2:5], bottleneck().slot_offsets)
        with pytest.raises(ValueError, match=field):
            cuda_vectors.SCALE.run(arguments._replace(**{field: value}))
    assert not real_module.launches


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": torch.zeros(6, 256)}, r"output must be torch.float16 or torch.bfloat16"),
        ({"output": torch.zeros(6 * 256 + 1).half()[1:].view(6, 256)}, r"output must start at a multiple"),
        ({"hidden_states": torch.zeros(6, 260).half()[:, :256]}, r"rows of hidden_states.*apart"),
        ({"arena": torch.zeros(9000).half()[3:]}, r"arena must start at a multiple"),
        ({"hidden_states": torch.zeros(6, 252).half()}, r"hidden_states must have .* multiple of 8"),
    ],
)
def test_cuda_refuses_what_its_kernels_cannot_read(
    real_module: RecordingModule, changes: dict[str, Tensor], message: str
) -> None:
    assert cuda_adapters.LORA.refuses(lora()) == ""
    assert cuda_adapters.BOTTLENECK.refuses(bottleneck()) == ""
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(cuda_adapters.LORA.refuses(lora(**changes)))


def test_cuda_refuses_a_bottleneck_that_is_too_wide(real_module: RecordingModule) -> None:
    wide = torch.zeros(1, 8192, dtype=torch.float16)
    assert "256 to 4096" in cuda_adapters.BOTTLENECK.refuses(bottleneck(output=wide, hidden_states=wide))
    weight = torch.zeros(300, dtype=torch.float16)[1:257]
    assert "layer_norm" in cuda_adapters.BOTTLENECK.refuses(
        bottleneck(layer_norm_weight=weight, layer_norm_bias=weight)
    )


def test_cuda_refuses_more_tokens_than_a_grid_can_have() -> None:
    rows = torch.zeros(1, 256, dtype=torch.float16).expand(2**31, 256)
    reason = cuda_adapters.LORA.refuses(lora(output=rows, hidden_states=rows))
    assert reason == "tokens and segments must be fewer than 2^31 together, not 2147483648 and 2"
    arguments = VectorArguments(rows, *bottleneck()[2:5], bottleneck().slot_offsets)
    assert cuda_vectors.SCALE.refuses(arguments) == reason


def test_alignment_of_one_row_does_not_depend_on_its_stride() -> None:
    assert misaligned("row", torch.zeros(1, 260).half()[:, :256]) == ""


def test_tensors_of_two_devices_are_refused() -> None:
    arguments = lora(hidden_states=torch.ones(6, 256, device="meta"))
    with pytest.raises(ValueError, match="one device, but they are on cpu, meta"):
        _require_one_device(arguments, ())
    on_host = lora()._replace(
        output=torch.ones(6, 256, device="meta"),
        hidden_states=torch.ones(6, 256, device="meta"),
        arena=torch.ones(9, device="meta"),
    )
    names = ("segment_offsets", "segment_slots", "slot_offsets", "slot_ranks", "slot_scales")
    _require_one_device(on_host, names)


@pytest.mark.parametrize("is_first_on_cpu", [False, True])
def test_tensors_of_two_devices_are_no_addresses_in_inference_either(is_first_on_cpu: bool) -> None:
    """Without the dispatcher, which here takes what it makes of tensors without values."""
    on_cpu, elsewhere = torch.ones(6, 256), torch.ones(6, 256, device="meta")
    arguments = lora(
        dtype=torch.float32,
        output=on_cpu if is_first_on_cpu else elsewhere,
        hidden_states=elsewhere if is_first_on_cpu else on_cpu,
    )
    with torch.inference_mode():
        hmi_kernels.grouped_lora(*arguments[:8])
    assert (on_cpu == 1).all()


@pytest.mark.parametrize(
    ("compiled", "capabilities", "reason"),
    [
        ("8.0 9.0+PTX", [(9, 0)], ""),
        ("8.0 9.0+PTX", [(9, 0), (7, 5)], "need compute capability 8.0 or later, but cuda:1 has 7.5"),
        ("8.0", [(8, 6)], ""),
        ("8.6", [(8, 0)], "8.6, but cuda:0 has 8.0"),
        ("8.0", [(9, 0)], "8.0, but cuda:0 has 9.0: build hmi_kernels again with 9.0"),
        ("8.0+PTX", [(8, 0), (12, 0)], ""),
        ("8.0 9.0", [(12, 0)], "8.0 9.0, but cuda:0 has 12.0"),
        ("8.0 9.0a+PTX", [(9, 0), (8, 9)], ""),
        ("8.0 9.0a+PTX", [(9, 0), (10, 0)], "8.0 9.0a+PTX, but cuda:1 has 10.0"),
        ("10.0f", [(10, 3)], ""),
        ("10.0f+PTX", [(12, 0)], "10.0f+PTX, but cuda:0 has 12.0"),
    ],
)
def test_devices_that_no_compiled_code_is_for_have_no_cuda_backend(
    real_module: RecordingModule,
    monkeypatch: pytest.MonkeyPatch,
    compiled: str,
    capabilities: list[tuple[int, int]],
    reason: str,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(driver, "native", SimpleNamespace(cuda_architectures=compiled))
    real_module.capabilities = capabilities
    assert reason in driver.reason()
    assert bool(reason) == bool(driver.reason())


def test_a_fault_is_raised_once_and_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    word = ctypes.c_uint64(2 << 48 | 7)
    monkeypatch.setattr(driver, "_fault_words", {0: (word, 0)})
    with pytest.raises(ValueError, match="segment_slots are out of bounds at segment 7"):
        hmi_kernels.raise_faults()
    hmi_kernels.raise_faults()
    assert word.value == 0


def test_every_fault_of_the_kernels_has_a_text() -> None:
    source = (Path(__file__).parents[2] / "csrc" / "cuda" / "fault.h").read_text()
    enumerators = source.split("enum class Fault", 1)[1].split("}", 1)[0].count("\n  k")
    assert enumerators == len(driver._FAULTS)


class Watcher(TorchDispatchMode):
    """Notes what ops are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def scaled() -> tuple[Tensor, Tensor]:
    """Rows of ones by a vector, and the vector."""
    output, arena = torch.ones(3, 8), torch.arange(8.0)
    offsets, slots = torch.tensor([0, 3]), torch.tensor([0], dtype=torch.int32)
    hmi_kernels.grouped_scale(output, arena, offsets, slots, torch.tensor([0]))
    return output, arena


def test_in_inference_mode_ops_go_past_the_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors._grouped_scale, "_registered", None)
    with torch.inference_mode():
        output, arena = scaled()
        assert torch.equal(output, arena.expand(3, 8))
        with pytest.raises(ValueError, match="segment_offsets"):
            offsets, slots = torch.tensor([0, 9]), torch.tensor([0], dtype=torch.int32)
            hmi_kernels.grouped_scale(output, arena, offsets, slots, torch.tensor([0]))
    with pytest.raises(TypeError):
        scaled()


def test_who_looks_sees_ops_in_inference_mode_too() -> None:
    with torch.inference_mode(), Watcher() as watcher:
        scaled()
    assert "hmi::grouped_scale" in watcher.seen
    with torch.inference_mode(), torch.profiler.profile() as profiled:
        scaled()
    assert "hmi::grouped_scale" in [event.key for event in profiled.key_averages()]
