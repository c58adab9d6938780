"""Checkpoints of a distillation: one safetensors file with all that the next step depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hmi_engine.construct.distillation_settings import HeldOutLoss
from hmi_engine.construct.distillation_student import Student
from hmi_engine.errors import CheckpointError
from hmi_engine.knowledge.tensor_file import write_tensors

__all__ = ["Checkpoint", "StageState", "Task"]

FILE = "checkpoint.safetensors"
_STATE = "state"


class Task(BaseModel):
    """What is distilled from what and how: a checkpoint serves only the same task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_sha256: str
    teacher_sha256: str | None = None
    data_sha256: str
    plot_layers: int
    window: int
    domain: str | None
    processes: int
    settings: dict[str, Any]


class StageState(BaseModel):
    """How far a stage is. ``scaler`` is the loss scale of float16, empty otherwise."""

    model_config = ConfigDict(extra="forbid")

    losses: list[float] = []
    held_out: list[HeldOutLoss] = []
    seconds: float = 0.0
    scaler: dict[str, float] = {}


class _Contents(BaseModel):
    model_config = ConfigDict(extra="forbid")

    task: Task
    stages: list[StageState]


class Checkpoint:
    """The one checkpoint of a folder: written atomically, the one before it is gone then."""

    def __init__(self, folder: Path, task: Task) -> None:
        self._path, self._task = folder / FILE, task

    def save(self, student: Student, optimizer: torch.optim.Optimizer, stages: list[StageState]) -> None:
        """Keeps the parts that any stage may train, the optimizer's state, and how far the stages are.

        Raises:
            StoreFullError: no room; the checkpoint before it stays.
        """
        tensors = {
            f"student.{name}": tensor.detach().cpu().contiguous()
            for part in ("domain", "merge", "upper")
            for name, tensor in student.parts(part)
        }
        for number, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
        contents = _Contents(task=self._task, stages=stages)
        write_tensors(self._path, tensors, {_STATE: contents.model_dump_json()})

    def load(self, student: Student) -> tuple[list[StageState], dict[str, Tensor]]:
        """Puts the student back; returns stages and optimizer's tensors, both empty without a checkpoint.

        Raises:
            CheckpointError: it is damaged, or belongs to another base, text or settings.
        """
        if not self._path.exists():
            return [], {}
        try:
            with safe_open(self._path, framework="pt") as file:
                contents = _Contents.model_validate_json((file.metadata() or {})[_STATE])
                names = list(file.keys())
                tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
        except (OSError, SafetensorError, KeyError, ValidationError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"{self._path}: no readable checkpoint of a distillation ({reason}); remove the file to "
                "begin anew, or give another folder"
            ) from error
        self._check_same(contents.task)
        self._restore(student, tensors)
        return contents.stages, {name: t for name, t in tensors.items() if name.startswith("optimizer.")}

    def _check_same(self, found: Task) -> None:
        was, now = found.model_dump(), self._task.model_dump()
        was |= was.pop("settings")
        now |= now.pop("settings")
        changed = [name for name in now if was.get(name) != now[name] and not _is_free(name, was, now)]
        if not changed:
            return
        told = "; ".join(f"{name} was {was.get(name)!r:.100}, is {now[name]!r:.100}" for name in changed)
        raise CheckpointError(
            f"{self._path} belongs to another distillation: {told}. Give the same command to go on, or "
            "another folder to begin anew"
        )

    def _restore(self, student: Student, tensors: dict[str, Tensor]) -> None:
        for part in ("domain", "merge", "upper"):
            for name, parameter in student.parts(part):
                found = tensors.get(f"student.{name}")
                if found is None or found.shape != parameter.shape or found.dtype != parameter.dtype:
                    raise CheckpointError(
                        f"{self._path}: {name} is missing or has another shape; remove the file to begin anew"
                    )
                with torch.no_grad():
                    parameter.copy_(found)

    @staticmethod
    def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
        """Puts back what :meth:`load` returned; the optimizer must be over the same parameters."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            _, number, field = name.split(".")
            state.setdefault(int(number), {})[field] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def _is_free(name: str, was: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a setting may change on the way, as no bit of the model follows from it.

    ``cache_bytes`` may become less, where the disk is full: what is not kept is computed as it was, but for
    the corpus' rows, which are read wherever they have been written. With more of it, rows could be kept that
    were computed batch by batch so far, which differ in their last bits.
    """
    if name == "cache_bytes":
        return bool(now[name] < was.get(name, 0))
    return name == "checkpoint_every"
