"""Which implementation of the ops runs: said once for the process, or chosen by where the tensors are."""

from __future__ import annotations

import importlib.util
from types import TracebackType
from typing import NamedTuple

import torch

from hmi_kernels.native import native, native_reason
from hmi_kernels.settings import BACKEND_NAMES, setting

__all__ = ["BackendStatus", "active_backend", "backends", "use_backend"]


class BackendStatus(NamedTuple):
    """Whether a backend can be used here and, if not, why."""

    available: bool
    reason: str


def _cuda_reason() -> str:
    if native_reason:
        return native_reason
    if not native.with_cuda:
        return (
            "this release has no CUDA kernels yet" if torch.cuda.is_available() else "compiled without CUDA"
        )
    return "" if torch.cuda.is_available() else "no CUDA device or driver"


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return "this release has no Triton kernels yet"


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with the reason if it cannot be used here."""
    reasons = {"cuda": _cuda_reason(), "triton": _triton_reason(), "cpu": native_reason, "reference": ""}
    return {name: BackendStatus(not reason, reason) for name, reason in reasons.items()}


class _Choice:
    """Restores the choice before it at the end of a with-statement."""

    def __init__(self, previous: str) -> None:
        self._previous = previous

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        use_backend(self._previous)


_chosen = "auto"


def use_backend(name: str) -> _Choice:
    """Chooses the backend of every op in this process, from now on or for a with-statement.

    ``auto`` (the start, unless ``HMI_BACKEND`` says otherwise) takes ``cpu`` for CPU tensors if it is
    compiled, else ``reference``. Raises ValueError on an unknown name and on a backend that cannot be used
    here.
    """
    global _chosen
    if name not in ("auto", *BACKEND_NAMES):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKEND_NAMES)}, not {name!r}")
    if name != "auto" and (reason := backends()[name].reason):
        raise ValueError(f"backend {name} cannot be used: {reason}")
    previous, _chosen = _chosen, name
    return _Choice(previous)


def active_backend(device_type: str = "cpu") -> str:
    """The backend that an op takes for tensors on this kind of device: ``cpu`` or ``reference``.

    Raises ValueError if the chosen one cannot work on such tensors.
    """
    if _chosen == "auto":
        return "cpu" if device_type == "cpu" and not native_reason else "reference"
    if _chosen == "cpu" and device_type != "cpu":
        raise ValueError(
            f"backend cpu was chosen, but the tensors are on {device_type}: use auto or reference"
        )
    return _chosen


use_backend(setting("HMI_BACKEND"))
