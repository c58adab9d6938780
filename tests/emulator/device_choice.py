"""Whether tests of the kernels run on the emulator or on a GPU: what ``pytest --device`` said."""

from __future__ import annotations

__all__ = ["DEVICES", "choose_device", "chosen_device", "require_direct_calls", "require_emulator"]

DEVICES = {
    "cpu": "emulated CUDA kernels, interpreted Triton kernels",
    "cuda": "the GPU, to which staging.py copies the tensors of each call",
    "staged": "as cpu, with the detour that cuda takes: shows that tests bear it",
}
_chosen = ["cpu"]


def choose_device(name: str) -> None:
    """Where the kernels run from now on, one of :data:`DEVICES`."""
    _chosen[0] = name


def chosen_device() -> str:
    """What was chosen; ``cpu`` to begin with."""
    return _chosen[0]


def require_emulator(what: str) -> None:
    """Skips the test if kernels run on a GPU; ``what`` only the emulator has."""
    if chosen_device() == "cuda":
        import pytest

        pytest.skip(f"needs the emulator: {what}")


def require_direct_calls(what: str) -> None:
    """Skips the test if calls make a detour (``staging.py``), which ``what`` does not bear."""
    if chosen_device() != "cpu":
        import pytest

        pytest.skip(f"calls make a detour, not borne by {what}; `make gpu-check` asks the same without one")
