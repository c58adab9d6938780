"""Tests of CPU tensors on the kernels of a GPU: ``pytest --device cuda``.

The tests of the CUDA and the Triton kernels make their tensors on the CPU, where their references work. With
``--device cuda`` every op that they call makes a detour: its tensors are copied to the GPU, storage by
storage (views, strides, gaps and alignment stay as they are), the op runs there, and what it wrote is copied
back. ``--device staged`` makes the same detour through other memory of the CPU, with the emulated kernels: it
shows without a GPU that tests bear it.

An op that is called by a staged op runs where that runs. While the backend ``cpu`` is chosen, of which a test
may want the answer beside that of the GPU, nothing makes a detour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import hmi_kernels

__all__ = ["ALIGNMENT", "HOST_OPS", "STAGED_OPS", "Staged", "StagedStorages"]

STAGED_OPS = frozenset(
    f"hmi::{name}"
    for name in (
        "causal_merge",
        "grouped_bottleneck",
        "grouped_lora",
        "grouped_scale",
        "grouped_bias",
        "grouped_bottleneck_delta",
        "grouped_lora_delta",
        "grouped_product",
        "grouped_weight_gradient",
        "packed_attention",
        "paged_attention",
        "plot_lookup",
        "plot_merge",
    )
)
"""Those that a backend of a GPU implements, or that are made of such."""
HOST_OPS = frozenset(
    f"hmi::{name}"
    for name in (
        "causal_lookup",
        "count_ngrams",
        "plot_index_build",
        "plot_index_find",
        "plot_index_insert",
    )
)
"""Those that no backend of a GPU implements, whatever is chosen; an op must be in one of the two sets."""
ALIGNMENT = 256
"""Bytes: no kernel asks for more."""


class Staged(TorchDispatchMode):
    """Within the with-statement the ops run on the device, called on tensors of the CPU."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        arguments: Mapping[str, Any] = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, arguments)) if isinstance(leaf, Tensor)]
        is_plain = all(type(tensor) is Tensor and tensor.device.type == "cpu" for tensor in tensors)
        name = function.name().split(".")[0] if hasattr(function, "name") else ""
        if name.startswith("hmi::") and name not in STAGED_OPS | HOST_OPS:
            raise NotImplementedError(f"{name} must be in STAGED_OPS or in HOST_OPS of {__file__}")
        if name not in STAGED_OPS or not is_plain or _is_cpu_chosen():
            return function(*args, **arguments)
        staged = StagedStorages(self._device)
        moved, moved_by_name = tree_map(staged.on_device, (tuple(args), dict(arguments)))
        try:
            result = function(*moved, **moved_by_name)
        finally:
            staged.write_back(_written(function, args, arguments))
        return tree_map(lambda value: value.to("cpu") if isinstance(value, Tensor) else value, result)


def _is_cpu_chosen() -> bool:
    """Whether tensors of the CPU go to its own backend."""
    try:
        return hmi_kernels.active_backend("cpu") == "cpu"
    except ValueError:  # the chosen one takes only tensors of a GPU
        return False


def _written(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that the schema calls mutable."""
    schema = function._schema.arguments
    values = {argument.name: value for argument, value in zip(schema, args, strict=False)} | dict(kwargs)
    mutable = [a.name for a in schema if a.alias_info is not None and a.alias_info.is_write]
    return [leaf for name in mutable for leaf in tree_leaves(values.get(name)) if isinstance(leaf, Tensor)]


class StagedStorages:
    """Copies of storages on the device, each made once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies: dict[int, Tensor] = {}

    def on_device(self, value: Any) -> Any:
        """A view of the copy for a tensor; other values as they are."""
        if not isinstance(value, Tensor) or value.untyped_storage().nbytes() == 0:
            return value.to(self._device) if isinstance(value, Tensor) else value
        copy = self._copy_of(value)
        shift, size = copy.storage_offset(), value.element_size()
        view = torch.empty(0, dtype=value.dtype, device=self._device)
        offset = shift // size + value.storage_offset()
        return view.set_(copy.untyped_storage(), offset, value.shape, value.stride())

    def write_back(self, tensors: Sequence[Tensor]) -> None:
        """Copies the storages of these tensors back, and so waits for the device."""
        for tensor in tensors:
            if tensor.untyped_storage().nbytes():
                _bytes_of(tensor).copy_(self._copy_of(tensor))

    def _copy_of(self, tensor: Tensor) -> Tensor:
        """uint8 [bytes of the storage], as far from a multiple of 256 bytes as the storage is."""
        host = _bytes_of(tensor)
        address = host.data_ptr()
        if address not in self._copies:
            buffer = torch.empty(len(host) + 2 * ALIGNMENT, dtype=torch.uint8, device=self._device)
            shift = (address - buffer.data_ptr()) % ALIGNMENT
            self._copies[address] = buffer[shift : shift + len(host)].copy_(host)
        return self._copies[address]


def _bytes_of(tensor: Tensor) -> Tensor:
    """The whole storage."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
