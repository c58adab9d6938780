"""Registers the ops with torch.library, each as one straight road: check, then the backend's implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hmi_kernels.backends import active_backend

_LIBRARY = torch.library.Library("hmi", "DEF")


def define(
    schema: str,
    *,
    check: Callable[..., None],
    cpu: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Registers ``hmi::<schema>`` and returns the op, to be called like a function.

    ``check`` sees the arguments first and raises; ``cpu`` and ``reference`` may rely on it. All of them, and ``fake``
    (shapes and dtypes alone), take the schema's arguments.
    """
    name = schema.split("(")[0]
    implementations = {"cpu": cpu, "reference": reference}

    def implement(device_type: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            check(*args, **kwargs)
            return implementations[active_backend(device_type)](*args, **kwargs)

        return run

    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implement("cpu"), "CPU")
    _LIBRARY.impl(name, implement("cuda"), "CUDA")
    torch.library.register_fake(f"hmi::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.hmi, name).default
