"""Which implementation of the ops runs: said once for the process, or chosen by where the tensors are."""

from __future__ import annotations

import importlib.util
from functools import cache, lru_cache
from types import TracebackType
from typing import NamedTuple

import torch

from hmi_kernels.cuda import driver
from hmi_kernels.native import native_reason
from hmi_kernels.settings import BACKEND_NAMES, is_triton_interpreted, setting

__all__ = ["BackendStatus", "active_backend", "backends", "candidates", "use_backend"]


class BackendStatus(NamedTuple):
    """Whether a backend can be used here and, if not, why."""

    available: bool
    reason: str


def _triton_reason() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.is_available() or is_triton_interpreted():
        return ""
    return "no GPU (TRITON_INTERPRET=1 runs its kernels on the CPU, slowly)"


def backends() -> dict[str, BackendStatus]:
    """Every backend by name, with the reason if it cannot be used here."""
    reasons = {
        "cuda": driver.reason(),
        "triton": _triton_reason(),
        "cpu": native_reason,
        "reference": "",
    }
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

    ``auto`` (the start, unless ``HMI_BACKEND`` says otherwise) takes the first that can run the call: on a
    GPU ``cuda``, ``triton``, ``reference``; on the CPU ``cpu``, ``reference``. Another name binds every op
    that this backend implements: what it cannot run is an error. Ops that it does not implement stay
    automatic. Raises ValueError on an unknown name and on a backend that cannot be used here.
    """
    global _chosen
    if name not in ("auto", *BACKEND_NAMES):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKEND_NAMES)}, not {name!r}")
    if name != "auto" and (reason := backends()[name].reason):
        raise ValueError(f"backend {name} cannot be used: {reason}")
    previous, _chosen = _chosen, name
    return _Choice(previous)


def candidates(device_type: str, implemented: frozenset[str]) -> tuple[str, ...]:
    """The backends to try for tensors on this kind of device, in order, of those that are implemented.

    Raises ValueError if the chosen one cannot work on such tensors.
    """
    return _candidates(_chosen, device_type, implemented, driver.is_emulated())


# What can be used does not change while a process runs, and asking it takes longer than a small op.
@lru_cache(maxsize=256)
def _candidates(
    chosen: str, device_type: str, implemented: frozenset[str], is_emulated: bool
) -> tuple[str, ...]:
    if chosen == "reference":
        return ("reference",)
    if chosen != "auto" and chosen in implemented:
        _require_device(chosen, device_type, is_emulated)
        return (chosen,)
    return tuple(name for name in _automatic_order(device_type) if name in implemented or name == "reference")


@cache
def _automatic_order(device_type: str) -> tuple[str, ...]:
    order = ("cpu", "reference") if device_type == "cpu" else ("cuda", "triton", "reference")
    status = backends()
    return tuple(name for name in order if status[name].available)


def _require_device(backend: str, device_type: str, is_emulated: bool) -> None:
    works_on_cpu = {"cpu": True, "cuda": is_emulated, "triton": is_triton_interpreted()}[backend]
    works_on_gpu = backend != "cpu" and not works_on_cpu
    if not (works_on_cpu if device_type == "cpu" else works_on_gpu):
        raise ValueError(
            f"backend {backend} was chosen, but the tensors are on {device_type}: use auto or reference"
        )


def active_backend(device_type: str = "cpu") -> str:
    """The backend that an op which all implement tries first for tensors on this kind of device.

    Raises ValueError if the chosen one cannot work on such tensors.
    """
    return candidates(device_type, frozenset(BACKEND_NAMES))[0]


use_backend(setting("HMI_BACKEND"))
