"""The loop that trains and distils small decoders: every step follows from its number, so runs can resume."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from torch import Tensor, nn

from hmi_engine.errors import CheckpointError, TrainingDivergedError
from hmi_engine.knowledge.tensor_file import write_tensors

__all__ = [
    "Batches",
    "Checkpoint",
    "Curve",
    "Precision",
    "Recipe",
    "Report",
    "progress_bar",
    "tensors_sha256",
    "train",
]

_STATE = "state"
_RECENT = 20

Report = Callable[[int, int, float], None]
"""Told after each step: steps done, all steps, mean loss of the latest."""


Precision = Literal["no", "bf16"]


class Recipe(BaseModel):
    """How to optimise: AdamW with decoupled decay on matrices, linear warm-up, cosine decay to a tenth.

    With ``mixed_precision="bf16"`` products are made in bfloat16, by autocast; weights stay float32.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    batch: int = 8
    learning_rate: float = 1e-3
    warmup_share: float = 0.05
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_gradient_norm: float = 1.0
    evaluate_every: int = 100
    checkpoint_every: int = 100
    seed: int = 0
    mixed_precision: Precision = "no"

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step ``step``, which counts from 0."""
        warmup = max(1, round(self.warmup_share * self.steps))
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))

    def optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        """AdamW over the parameters that follow gradients; vectors do not decay."""
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [each for each in learned if each.dim() > 1], "weight_decay": self.weight_decay},
            {"params": [each for each in learned if each.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)


class Curve(BaseModel):
    """How a training went: the loss of every step; held-out figures by name, with the step before them."""

    model_config = ConfigDict(extra="forbid")

    losses: list[float] = []
    held_out: list[tuple[int, dict[str, float]]] = []
    seconds: float = 0.0


class Batches:
    """Batches of packed sequences [S, P] in an order that epoch and seed decide."""

    def __init__(self, sequences: Tensor, size: int, seed: int) -> None:
        """Raises ValueError if there is not one batch."""
        if len(sequences) < size:
            raise ValueError(f"the text gives {len(sequences)} sequences, a batch takes {size}")
        self._sequences, self._size, self._seed = sequences, size, seed
        self._order: tuple[int, Tensor] | None = None

    def at(self, step: int) -> Tensor:
        """The batch of a step, [size, P]."""
        epoch, number = divmod(step, len(self._sequences) // self._size)
        if self._order is None or self._order[0] != epoch:
            order = torch.randperm(len(self._sequences), generator=self.generator("epoch", epoch))
            self._order = epoch, order
        return self._sequences[self._order[1][number * self._size : (number + 1) * self._size]]

    def generator(self, purpose: str, number: int) -> torch.Generator:
        """The source of chance of one step or epoch."""
        digest = hashlib.sha256(f"{self._seed} {purpose} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Checkpoint:
    """Weights, the optimizer's tensors and the curve in one safetensors file, replaced atomically."""

    def __init__(self, path: Path, task: dict[str, Any]) -> None:
        """``task`` says what is trained and how: only the same task goes on from the file."""
        self._path = path
        self._task = json.loads(json.dumps(task))

    def save(self, model: nn.Module, optimizer: torch.optim.Optimizer, curve: Curve) -> None:
        """Replaces the checkpoint. Raises StoreFullError if there is no room; the one before stays."""
        tensors = {f"model.{name}": each.detach().cpu() for name, each in model.named_parameters()}
        for number, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                tensors[f"optimizer.{number}.{name}"] = torch.as_tensor(value).detach().cpu()
        contents = json.dumps({"task": self._task, "curve": curve.model_dump()})
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_tensors(self._path, contiguous, {_STATE: contents})

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Curve | None:
        """Puts model and optimizer back where they were; None if there is no checkpoint.

        Raises CheckpointError if it belongs to another task.
        """
        if not self._path.exists():
            return None
        with safe_open(self._path, framework="pt") as file:
            contents = json.loads((file.metadata() or {})[_STATE])
            if contents["task"] != self._task:
                raise CheckpointError(
                    f"{self._path} belongs to another training: {contents['task']}. Give the same options to "
                    "go on, or another folder to begin anew"
                )
            states: dict[int, dict[str, Tensor]] = {}
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(file.get_tensor(f"model.{name}"))
            keys = list(file.keys())
            for key in keys:
                kind, *rest = key.split(".")
                if kind == "optimizer":
                    states.setdefault(int(rest[0]), {})[rest[1]] = file.get_tensor(key)
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})
        return Curve.model_validate(contents["curve"])

    def remove(self) -> None:
        """Removes the file, once the result is written."""
        self._path.unlink(missing_ok=True)


class Measure(Protocol):
    """Figures on held-out text, by name."""

    def __call__(self) -> dict[str, float]:
        """Measures the model as it is."""


def train(
    model: nn.Module,
    recipe: Recipe,
    loss_of: Callable[[int], Tensor],
    measure: Measure,
    checkpoint: Checkpoint,
    report: Report,
) -> Curve:
    """Takes all steps that the checkpoint has not taken yet.

    Args:
        model: what learns: its parameters that follow gradients.
        recipe: the optimisation.
        loss_of: the loss of a step; all chance in it follows from the step's number.
        measure: held-out figures, taken before the first step, now and then, and after the last.
        checkpoint: where the training goes on, and is kept.
        report: told after each step.

    Raises:
        TrainingDivergedError: a loss is no number.
    """
    optimizer = recipe.optimizer(model)
    curve = checkpoint.load(model, optimizer) or Curve()
    if not curve.held_out:
        curve.held_out.append((0, measure()))
    before, started = curve.seconds, time.perf_counter()
    while len(curve.losses) < recipe.steps:
        curve.losses.append(_step(model, optimizer, recipe, loss_of, len(curve.losses)))
        done = len(curve.losses)
        is_last = done == recipe.steps
        if is_last or done % recipe.evaluate_every == 0:
            curve.held_out.append((done, measure()))
        if is_last or done % recipe.checkpoint_every == 0:
            curve.seconds = before + time.perf_counter() - started
            checkpoint.save(model, optimizer, curve)
        recent = curve.losses[-_RECENT:]
        report(done, recipe.steps, sum(recent) / len(recent))
    return curve


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    loss_of: Callable[[int], Tensor],
    step: int,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate_at(step)
    with _autocast(model, recipe.mixed_precision):
        loss = loss_of(step)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingDivergedError(f"the loss of step {step + 1} is {value}; choose a lower learning rate")
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
    optimizer.step()
    optimizer.zero_grad()
    return value


def _autocast(model: nn.Module, precision: Precision) -> torch.autocast:
    device = next(model.parameters()).device.type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")


def tensors_sha256(*tensors: Tensor) -> str:
    """Digest of tensors' bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def progress_bar(title: str) -> Iterator[Report]:
    """A progress bar on standard error; where that is no terminal, a line every hundred steps."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=None, loss=math.nan)

        def report(done: int, total: int, loss: float) -> None:
            bars.update(task, completed=done, total=total, loss=loss)
            if not console.is_terminal and done % 100 == 0:
                taken = time.perf_counter() - started
                console.print(f"[{taken:6.0f} s] {title}: step {done} of {total}, loss {loss:.4f}")

        yield report
