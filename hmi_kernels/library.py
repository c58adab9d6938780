"""Registers the ops with torch.library, each as one road: gather, check, the backend's implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from hmi_kernels.backends import active_backend

_LIBRARY = torch.library.Library("hmi", "DEF")
Arguments = TypeVar("Arguments", bound=tuple[Any, ...])


def define(
    schema: str,
    *,
    arguments: Callable[..., Arguments],
    check: Callable[[Arguments], None],
    cpu: Callable[[Arguments], Any],
    reference: Callable[..., Any],
    fake: Callable[[Arguments], Any],
) -> Any:
    """Registers ``hmi::<schema>`` and returns the op, to be called like a function.

    ``arguments`` gathers what the schema names into a named tuple. ``check`` sees it first and raises;
    ``cpu`` may rely on that, as may ``reference``, which takes the schema's own arguments. ``fake`` makes
    outputs of the right shape and dtype.
    """
    name = schema.split("(", maxsplit=1)[0]

    def run_on_cpu(*args: Any, **kwargs: Any) -> Any:
        # Dispatched here only if every tensor is on the CPU.
        gathered = arguments(*args, **kwargs)
        check(gathered)
        return cpu(gathered) if active_backend() == "cpu" else reference(*args, **kwargs)

    def run_on_cuda(*args: Any, **kwargs: Any) -> Any:
        gathered = arguments(*args, **kwargs)
        _require_one_device(gathered)
        check(gathered)
        active_backend("cuda")
        return reference(*args, **kwargs)

    def make_fake(*args: Any, **kwargs: Any) -> Any:
        return fake(arguments(*args, **kwargs))

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run_on_cpu, "CPU")
    _LIBRARY.impl(name, run_on_cuda, "CUDA")
    torch.library.register_fake(f"hmi::{name}", make_fake, lib=_LIBRARY)
    return getattr(torch.ops.hmi, name).default


def _require_one_device(arguments: tuple[Any, ...]) -> None:
    flat = [item for value in arguments for item in (value if isinstance(value, list) else [value])]
    devices = {str(tensor.device) for tensor in flat if isinstance(tensor, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"all tensors must be on one device, but they are on {', '.join(sorted(devices))}")
