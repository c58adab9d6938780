"""Launches of kernels of several configurations: Triton's tuner is asked once for a shape, if at all.

A server cannot stand still for seconds whenever a shape is new: only with ``HMI_TRITON_TUNE=1`` is anything
tried, else the first configuration is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hmi_kernels.settings import setting

__all__ = ["tuned_launch"]

_choices: dict[tuple[Any, ...], dict[str, Any]] = {}
"""By kernel, key and whatever else its tuner tells shapes apart by."""


def tuned_launch(
    kernel: Any,
    grid: Callable[[dict[str, Any]], tuple[int, ...]],
    key: tuple[Any, ...],
    *arguments: Any,
    **constants: Any,
) -> None:
    """``kernel[grid](*arguments, **constants)``, of whose tuning the key names all that it depends on.

    The tuner itself makes its key from all arguments by name, at every call, which takes longer than the
    launch. Dtypes that follow from another one's need not be in ours.
    """
    choice = _choices.get((kernel, key))
    if choice is None and setting("HMI_TRITON_TUNE") != "1":
        choice = _choices[kernel, key] = kernel.configs[0].all_kwargs()
    if choice is None:
        kernel[grid](*arguments, **constants)
        # Not there where a tuner was made to compile only, as for GPUs that the machine lacks.
        if (chosen := getattr(kernel, "best_config", None)) is not None:
            _choices[kernel, key] = chosen.all_kwargs()
    else:
        kernel.fn[grid](*arguments, **constants, **choice)
