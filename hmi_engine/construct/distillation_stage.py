"""One stage of a distillation: its losses, its steps, and the loss on held-out text."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmi_engine.construct.distillation_calibration import fit_layer_norm, is_untrained
from hmi_engine.construct.distillation_checkpoint import Checkpoint, StageState
from hmi_engine.construct.distillation_corpus import DistillationBatch, DistillationCorpus, Misses
from hmi_engine.construct.distillation_rows import CorpusRows
from hmi_engine.construct.distillation_settings import (
    DistillationProgress,
    DistillationSettings,
    HeldOutLoss,
    StageSettings,
)
from hmi_engine.construct.distillation_student import DenseShape, Student, run_layers, value_relations
from hmi_engine.construct.distillation_teacher import Teacher
from hmi_engine.construct.distillation_windows import MergePlan, plan_merge
from hmi_engine.errors import TrainingDivergedError, TrainingMemoryError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["StageTrainer", "draw_misses"]

RECENT_STEPS = 10
CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class _Inputs:
    """A batch as the student takes it, and what the teacher makes of it.

    ``rows`` is None where domain layers learn; ``upper`` is empty where no loss is taken above the merge.
    """

    plan: MergePlan
    rows: Tensor | None
    dense: DenseShape
    merged: Tensor
    upper: list[Tensor]


class _StageModel(nn.Module):
    """The student with the losses of a stage around it."""

    def __init__(self, student: Student, stage: StageSettings, teacher: Teacher) -> None:
        super().__init__()
        self.student, self._stage, self._teacher = student, stage, teacher

    def forward(self, inputs: _Inputs) -> Tensor:
        """The loss of a batch."""
        stage = self._stage
        merged, outputs = self._run(inputs)
        loss = stage.merged_weight * _relative_error(merged, inputs.merged)
        if stage.upper_weight:
            errors = [_relative_error(*pair) for pair in zip(outputs, inputs.upper, strict=True)]
            loss = loss + stage.upper_weight * torch.stack(errors).mean()
        if stage.final_weight:
            loss = loss + stage.final_weight * _relative_error(outputs[-1], inputs.upper[-1])
        if stage.relation_weight:
            loss = loss + stage.relation_weight * self._relation_loss(merged, outputs, inputs)
        return loss

    def _run(self, inputs: _Inputs) -> tuple[Tensor, list[Tensor]]:
        student = self.student
        rows = student.window_rows(inputs.plan) if inputs.rows is None else inputs.rows
        merged = student.merge(rows, inputs.plan, inputs.dense.positions())
        outputs = run_layers(student.upper_layers, merged, inputs.dense) if inputs.upper else []
        return merged, outputs

    def _relation_loss(self, merged: Tensor, outputs: list[Tensor], inputs: _Inputs) -> Tensor:
        ours = value_relations(self.student.upper_layers[-1], [merged, *outputs][-2], inputs.dense)
        theirs = self._teacher.relations([inputs.merged, *inputs.upper][-2], inputs.dense)
        per_row = functional.kl_div(ours.float(), theirs.float(), reduction="sum", log_target=True)
        return per_row / (theirs.shape[0] * theirs.shape[1])

    @torch.no_grad()
    def errors(self, inputs: _Inputs) -> Tensor:
        """Relative errors at the merge and after each upper layer."""
        merged, outputs = self._run(inputs)
        pairs = zip([merged, *outputs], [inputs.merged, *inputs.upper], strict=True)
        return torch.stack([_relative_error(*pair) for pair in pairs])


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of [T, H] over the target's variance over tokens."""
    output = output.float()
    return functional.mse_loss(output, target) / target.var(dim=0, unbiased=False).mean()


def draw_misses(
    batch: DistillationBatch, window: int, settings: DistillationSettings, generator: torch.Generator
) -> Misses:
    """Which n-grams are left out of the table for a batch in one step; each sequence draws its own share."""
    num_tokens = batch.sequences.num_tokens
    if settings.misses == "none":
        return Misses.none(num_tokens)
    low, high = settings.drawn_shares
    shares = low + (high - low) * torch.rand(batch.sequences.num_sequences, generator=generator)
    share = torch.repeat_interleave(shares, torch.tensor(batch.sequences.lengths))
    drawn = torch.rand(2, num_tokens, generator=generator)
    if settings.misses == "cross_fitted":
        pairs = batch.misses.pairs & (drawn[0] < share)
        return Misses(pairs, pairs if window == 2 else batch.misses.windows & (drawn[1] < share))
    # Tables hold bigrams rather than trigrams: a bigram is never rarer than a trigram that it is part of.
    pairs = drawn[0] < (share if window == 2 else share / 2)
    return Misses(pairs, pairs if window == 2 else drawn[1] < share)


class StageTrainer:
    """Runs the steps of one stage, through ``accelerate``."""

    def __init__(
        self,
        number: int,
        student: Student,
        teacher: Teacher,
        corpus: DistillationCorpus,
        rows: CorpusRows | None,
        placeholder: int,
        settings: DistillationSettings,
        accelerator: Accelerator,
    ) -> None:
        """Prepares stage ``number`` (0 or 1); ``rows`` are None where the stage trains domain layers."""
        self._number, self._settings, self._stage = number, settings, settings.stages[number]
        self._corpus, self._teacher, self._rows, self._placeholder = corpus, teacher, rows, placeholder
        self._accelerator = accelerator
        for parameter in student.parameters():
            parameter.requires_grad_(False)
        groups = list(self._parameter_groups(student))
        self.optimizer = torch.optim.AdamW(groups)
        self._student = student
        self._model, self._prepared = accelerator.prepare(
            _StageModel(student, self._stage, teacher), self.optimizer
        )
        self._order: tuple[int, Tensor] | None = None

    def _parameter_groups(self, student: Student) -> Iterator[dict[str, Any]]:
        """Matrices decay, vectors do not; the position table does not either, as most of it rarely learns."""
        stage = self._stage
        for part in stage.trainable:
            rate = stage.merge_learning_rate if part == "merge" else stage.learning_rate
            matrices: list[nn.Parameter] = []
            vectors: list[nn.Parameter] = []
            for _, parameter in student.parts(part):
                parameter.requires_grad_(True)
                (matrices if parameter.dim() > 1 and part != "merge" else vectors).append(parameter)
            for members, decay in ((matrices, self._settings.weight_decay), (vectors, 0.0)):
                if members:
                    yield {"params": members, "lr": rate, "peak": rate, "weight_decay": decay}

    def run(
        self,
        state: StageState,
        save: Callable[[], None],
        progress: DistillationProgress | None = None,
    ) -> None:
        """Takes the steps that ``state`` does not have yet, and notes them there.

        Args:
            state: of this stage.
            save: keeps a checkpoint.
            progress: told after each step.

        Raises:
            TrainingDivergedError: a loss is no number; the last checkpoint holds the last good state.
            TrainingMemoryError: a step does not fit into memory.
        """
        name = f"distilling, stage {self._number + 1}"
        self._restore_scaler(state)
        if not state.held_out:
            state.held_out.append(self._measure(0))
            self._calibrate()
        started, before = time.perf_counter(), state.seconds
        while len(state.losses) < self._stage.steps:
            with _memory_advice(self._settings):
                state.losses.append(self._step(len(state.losses)))
            done = len(state.losses)
            is_last = done == self._stage.steps
            if progress is not None:
                recent = state.losses[-RECENT_STEPS:]
                progress(name, done, self._stage.steps, {"loss": sum(recent) / len(recent)})
            if is_last or done % self._settings.evaluate_every == 0:
                state.held_out.append(self._measure(done))
            if is_last or done % self._settings.checkpoint_every == 0:
                state.seconds = before + time.perf_counter() - started
                state.scaler = self._scaler_state()
                save()

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Lets an undistilled merge start from the LayerNorm that fits some batches best."""
        student = self._student
        if "merge" not in self._stage.trainable or not is_untrained(student.merge.layer_norm):
            return

        def outputs() -> Iterator[tuple[Tensor, Tensor]]:
            for place in range(min(CALIBRATION_BATCHES, len(self._corpus.training))):
                batch, generator = self._draw(place)
                misses = draw_misses(batch, self._corpus.window, self._settings, generator)
                inputs = self._inputs(batch, misses, with_upper=False)
                rows = student.window_rows(inputs.plan) if inputs.rows is None else inputs.rows
                yield student.merge(rows, inputs.plan, inputs.dense.positions()), inputs.merged

        fit_layer_norm(student.merge.layer_norm, outputs())

    def _step(self, number: int) -> float:
        accumulated = self._settings.gradient_accumulation
        self._set_learning_rate(number)
        losses = []
        for part in range(accumulated):
            place = (number * accumulated + part) * self._accelerator.num_processes
            batch, generator = self._draw(place + self._accelerator.process_index)
            misses = draw_misses(batch, self._corpus.window, self._settings, generator)
            inputs = self._inputs(batch, misses, with_upper=self._stage.reads_upper_layers)
            is_last = part == accumulated - 1
            with nullcontext() if is_last else self._accelerator.no_sync(self._model):
                with self._accelerator.autocast():
                    loss = self._model(inputs)
                losses.append(float(self._accelerator.reduce(loss.detach(), "mean")))
                self._check_finite(losses[-1], number, batch)
                self._accelerator.backward(loss)
        self._accelerator.clip_grad_norm_(self._model.parameters(), self._settings.max_gradient_norm)
        self._prepared.step()
        self._prepared.zero_grad()
        return sum(losses) / len(losses)

    def _set_learning_rate(self, step: int) -> None:
        """Linear warm-up, then linear decay to zero."""
        total = self._stage.steps
        warmup = max(1, round(total * self._settings.warmup_fraction))
        factor = min((step + 1) / warmup, (total - step) / max(1, total - warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor

    def _draw(self, place: int) -> tuple[DistillationBatch, torch.Generator]:
        """The batch at a place of the stage's endless sequence, and where its chances come from.

        Both follow from the place alone, so a checkpoint needs no state of a random generator.
        """
        batches = self._corpus.training
        epoch, index = divmod(place, len(batches))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, torch.randperm(len(batches), generator=self._generator(epoch, 0))
        return batches[int(self._order[1][index])], self._generator(place, 1)

    def _generator(self, number: int, purpose: int) -> torch.Generator:
        name = f"{self._settings.seed} {self._number} {number} {purpose}"
        digest = hashlib.sha256(name.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def _inputs(self, batch: DistillationBatch, misses: Misses, *, with_upper: bool) -> _Inputs:
        device = self._accelerator.device
        plan = plan_merge(batch.sequences, misses, self._corpus.window, self._placeholder)
        rows = None if self._rows is None else self._rows.get(plan).to(device)
        upper = self._teacher.upper(batch) if with_upper else []
        return _Inputs(
            plan.to(device),
            rows,
            DenseShape(batch.sequences, device),
            self._teacher.merged(batch).to(device, torch.float32),
            [states.to(device, torch.float32) for states in upper],
        )

    def _check_finite(self, loss: float, step: int, batch: DistillationBatch) -> None:
        if math.isfinite(loss):
            return
        ids = batch.sequences.input_ids[: batch.sequences.lengths[0]].tolist()
        raise TrainingDivergedError(
            f"the loss of step {step + 1} of stage {self._number + 1} is {loss} (batch {batch.number}, "
            f"{batch.sequences.num_sequences} sequences, the first with tokens {ids[:8]}...); the last "
            "checkpoint holds the state before: begin anew in another folder with a lower learning rate, or "
            "without mixed precision"
        )

    def _measure(self, step: int) -> HeldOutLoss:
        """Losses on the held-out text; every process measures all of it."""
        model = self._accelerator.unwrap_model(self._model)
        return HeldOutLoss(
            step=step,
            exact=self._mean_errors(model, found=True),
            backoff=self._mean_errors(model, found=False),
        )

    def _mean_errors(self, model: _StageModel, *, found: bool) -> tuple[float, ...]:
        first = len(self._corpus.training)
        total, tokens = torch.zeros(()), 0
        for batch in self._corpus.batches[first:]:
            misses = Misses.none(batch.sequences.num_tokens) if found else batch.misses
            inputs = self._inputs(batch, misses, with_upper=True)
            total = total + model.errors(inputs).cpu() * batch.sequences.num_tokens
            tokens += batch.sequences.num_tokens
        return tuple((total / tokens).tolist())

    def _scaler_state(self) -> dict[str, float]:
        scaler = self._accelerator.scaler
        return {} if scaler is None else {name: float(value) for name, value in scaler.state_dict().items()}

    def _restore_scaler(self, state: StageState) -> None:
        if state.scaler and self._accelerator.scaler is not None:
            restored = state.scaler | {
                name: int(state.scaler[name]) for name in ("growth_interval", "_growth_tracker")
            }
            self._accelerator.scaler.load_state_dict(restored)

    def checkpoint(self, checkpoint: Checkpoint, stages: list[StageState]) -> None:
        """Keeps a checkpoint, on the main process."""
        if self._accelerator.is_main_process:
            self._teacher.sync()
            checkpoint.save(self._student, self.optimizer, stages)
        self._accelerator.wait_for_everyone()


@contextmanager
def _memory_advice(settings: DistillationSettings) -> Iterator[None]:
    """Tells which setting makes a step smaller."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        is_full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_full and "can't allocate memory" not in str(error):
            raise
        raise TrainingMemoryError(
            f"a step with batch_tokens={settings.batch_tokens} does not fit into memory; begin anew with "
            f"batch_tokens={settings.batch_tokens // 2} (--batch-tokens) and gradient_accumulation="
            f"{settings.gradient_accumulation * 2} (--gradient-accumulation), which learns the same"
        ) from error
