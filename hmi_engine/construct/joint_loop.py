"""The loop over epochs and batches for many tenants at once.

Every round each tenant takes one step on a batch of its own. The batches run through the shared layers
together, in passes of a bounded number of tokens; each tenant's loss, schedule, clipping, validation and
early stopping are its own, as in :mod:`hmi_engine.construct.training_loop`, and its random numbers too. So a
tenant learns the same in any company, but for rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from hmi_engine.construct.hidden_dropout import HiddenDropout
from hmi_engine.construct.packed_batch import PackedBatch
from hmi_engine.construct.stacked_optimizer import StackedOptimizer
from hmi_engine.construct.stacked_tenants import StackedTenants
from hmi_engine.construct.trainable_adapter import AppliedAdapter
from hmi_engine.construct.trainable_layers import TrainableLayers
from hmi_engine.construct.training import PreparedTraining
from hmi_engine.construct.training_cache import HiddenStateCache
from hmi_engine.construct.training_data import WordPlaces, length_batches
from hmi_engine.construct.training_loop import (
    MAX_GRADIENT_NORM,
    TRAINING_STAGE,
    Course,
    FitResult,
    diverged,
    learning_rate_factor,
    num_steps,
)
from hmi_engine.construct.training_schedule import Schedule
from hmi_engine.construct.training_settings import Epoch, TrainingProgress
from hmi_engine.errors import TrainingDivergedError
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import Readout

__all__ = ["fit_together"]

TOKENS_PER_PASS = 8192
"""What one forward and backward pass takes at most, unless one tenant's batch alone is more: products of so
many rows run at full speed, and the states between layers take 20 KB a token at H = 384."""

TEXTS_PER_PIECE = 32
"""Of one tenant's validation split, which may be more than a pass."""


def fit_together(
    trainings: Sequence[PreparedTraining], model: HierarchicalBert, progress: TrainingProgress | None = None
) -> list[FitResult | TrainingDivergedError]:
    """Fits all tenants, in place: as ``fit`` does for one, to what it returns or raises for each.

    Args:
        trainings: of one base model; adapters of one form, heads that read alike, and caches that are alike
            ``halfway``.
        model: the base.
        progress: told after each round, in steps of all tenants together.
    """
    learners = [_Learner(slot, training) for slot, training in enumerate(trainings)]
    stack = StackedTenants([training.tenant for training in trainings])
    company = _Company(model, stack, trainings[0])
    optimizer = StackedOptimizer(stack.tables(), MAX_GRADIENT_NORM)
    total = sum(learner.total_steps for learner in learners)
    while active := [learner for learner in learners if learner.is_active]:
        _take_steps(company, optimizer, active, len(learners))
        ended = [learner for learner in active if learner.is_epoch_over]
        _validate(company, stack, ended)
        if progress is not None:
            done = sum(learner.steps for learner in learners)
            progress(TRAINING_STAGE, done, total, _shown(learners))
    return [learner.result() for learner in learners]


class _Learner:
    """One tenant's course through its epochs."""

    def __init__(self, slot: int, training: PreparedTraining) -> None:
        self.slot, self.training = slot, training
        self.states, self.data = training.task.states, training.task.data
        self.objective = training.task.objective
        self.total_steps, self.steps = num_steps(training.task, training.settings), 0
        self._schedule = Schedule.of(training.settings, len(training.task.split.training))
        self.course = Course(self.objective.best_by)
        self.losses: list[float] = []
        self.failure: TrainingDivergedError | None = None
        self._lengths = self.data.lengths()
        self._batches = self._shuffled()

    def _shuffled(self) -> Iterator[list[int]]:
        training = self.training
        batches = list(
            length_batches(
                training.task.split.training,
                self._lengths,
                self._schedule.batch_size,
                training.generator,
            )
        )
        self._num_batches = len(batches)
        return iter(batches)

    def next_batch(self) -> list[int]:
        return next(self._batches)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        settings = self.training.settings
        factor = learning_rate_factor(self.steps, self.total_steps, settings.warmup_fraction)
        return settings.peak_learning_rate * factor

    @property
    def is_epoch_over(self) -> bool:
        return self.failure is None and len(self.losses) == self._num_batches

    @property
    def is_active(self) -> bool:
        is_over = self.steps == self.total_steps or self.course.is_exhausted(self._schedule.patience)
        return self.failure is None and not is_over

    def add_step(self, loss: float) -> None:
        self.losses.append(loss)
        self.steps += 1

    def fail(self) -> None:
        self.failure = diverged(self.steps + 1, len(self.losses) + 1, self.training.settings)

    def add_epoch(self, outputs: Tensor, save: Callable[[], object]) -> None:
        """Judges the validation split's outputs; ``save`` copies the parameters to the tenant."""
        numbers = self.training.task.split.validation
        loss = float(self.objective.loss(outputs, self.data.batch_targets(numbers)))
        if not math.isfinite(loss):
            self.fail()
            return
        values = self.objective.measure(outputs, self.data, numbers, resamples=0).values
        save()
        training_loss = sum(self.losses) / len(self.losses)
        epoch = Epoch(training_loss=training_loss, validation_loss=loss, metrics=values)
        self.course.add(epoch, self.training.tenant)
        self.losses = []
        if self.is_active:
            self._batches = self._shuffled()

    def result(self) -> FitResult | TrainingDivergedError:
        if self.failure is None:
            return self.course.finished(self.training.tenant)
        if self.course.best_epoch < 0:
            return self.failure
        return self.course.finished(
            self.training.tenant, f"{self.failure}, in epoch {len(self.course.history) + 1}"
        )


class _Texts:
    """What a pass reads for one tenant."""

    def __init__(self, learner: _Learner, texts: Sequence[int]) -> None:
        self.learner, self.texts = learner, texts
        self.words = learner.data.batch_words(texts)
        self.num_tokens = sum(len(learner.states.token_ids[text]) for text in texts)
        self.num_rows = len(texts) if self.words is None else len(self.words.places)

    def packable(self) -> list[tuple[int, HiddenStateCache, int]]:
        return [(self.learner.slot, self.learner.states, text) for text in self.texts]


class _Company:
    """The shared layers with the stacked tenants on them."""

    def __init__(self, model: HierarchicalBert, stack: StackedTenants, first: PreparedTraining) -> None:
        self._model, self._stack = model, stack
        settings = first.settings
        self._layers = TrainableLayers(model, stack.adapters, HiddenDropout(settings.dropout, settings.seed))
        self._reading = first.task.objective.reading

    def train(self, parts: Sequence[_Texts]) -> Iterator[Tensor]:
        """The heads' outputs for each part, with gradients."""
        batch = self._bind(parts)
        read = self._layers.read(batch, self._reading, _joined_words(parts))
        return self._heads(parts, read)

    @torch.no_grad()
    def predict(self, parts: Sequence[_Texts]) -> list[Tensor]:
        """The heads' outputs for each part, through the layers that serve."""
        batch = self._bind(parts)
        sequences = batch.sequences()
        hidden_states, first, is_first_only = (
            batch.rows(),
            self._stack.adapters.first_layer,
            self._reading == "cls",
        )
        if batch.halfway:
            hidden_states, first = self._layers.finish(hidden_states), first + 1
        rows = self._model.run_layers(
            hidden_states,
            sequences,
            first=first,
            adapters=AppliedAdapter(self._stack.adapters),
            readout=Readout.select(sequences, [is_first_only] * sequences.num_sequences),
        )
        return list(self._heads(parts, batch.read(rows, self._reading, _joined_words(parts))))

    def _bind(self, parts: Sequence[_Texts]) -> PackedBatch:
        batch = PackedBatch.pack([text for part in parts for text in part.packable()])
        self._stack.adapters.bind(batch)
        return batch

    def _heads(self, parts: Sequence[_Texts], read: Tensor) -> Iterator[Tensor]:
        rows = read.split([part.num_rows for part in parts])
        return self._stack.outputs([(part.learner.slot, own) for part, own in zip(parts, rows, strict=True)])


def _joined_words(parts: Sequence[_Texts]) -> WordPlaces | None:
    words = [part.words for part in parts if part.words is not None]
    if not words:
        return None
    starts = accumulate((len(part.texts) for part in parts[:-1]), initial=0)
    sequences = [own.sequences + start for own, start in zip(words, starts, strict=True)]
    return WordPlaces(torch.cat(sequences), torch.cat([own.places for own in words]))


def _passes(parts: Sequence[_Texts]) -> Iterator[list[_Texts]]:
    """Runs of parts of at most ``TOKENS_PER_PASS`` tokens, at least one part each."""
    run: list[_Texts] = []
    tokens = 0
    for part in parts:
        if run and tokens + part.num_tokens > TOKENS_PER_PASS:
            yield run
            run, tokens = [], 0
        run.append(part)
        tokens += part.num_tokens
    if run:
        yield run


def _take_steps(
    company: _Company, optimizer: StackedOptimizer, active: Sequence[_Learner], num_slots: int
) -> None:
    """One step of each; a tenant whose loss or gradient is not finite fails, and stays as it was."""
    batches = {learner.slot: learner.next_batch() for learner in active}
    parts = [_Texts(learner, learner.data.batch_texts(batches[learner.slot])) for learner in active]
    optimizer.zero_grad()
    values: dict[int, float] = {}
    for run in _passes(parts):
        with torch.enable_grad():
            losses = {}
            for part, outputs in zip(run, company.train(run), strict=True):
                learner = part.learner
                losses[learner.slot] = learner.training.task.loss(outputs, batches[learner.slot])
            finite = [loss for loss in losses.values() if math.isfinite(float(loss.detach()))]
            if finite:
                torch.stack(finite).sum().backward()
        values |= {slot: float(loss.detach()) for slot, loss in losses.items()}
    rates, decays = torch.zeros(num_slots), torch.zeros(num_slots)
    for learner in active:
        if math.isfinite(values[learner.slot]):
            rates[learner.slot] = learner.rate
            decays[learner.slot] = learner.training.settings.weight_decay
    is_finite = optimizer.step(rates, decays)
    for learner in active:
        if math.isfinite(values[learner.slot]) and is_finite[learner.slot]:
            learner.add_step(values[learner.slot])
        else:
            learner.fail()


def _validate(company: _Company, stack: StackedTenants, ended: Sequence[_Learner]) -> None:
    """Judges the tenants whose epoch is over by their validation splits."""
    pieces = []
    for learner in ended:
        texts = learner.data.batch_texts(learner.training.task.split.validation)
        starts = range(0, len(texts), TEXTS_PER_PIECE)
        pieces += [_Texts(learner, texts[start : start + TEXTS_PER_PIECE]) for start in starts]
    found: dict[int, list[Tensor]] = {learner.slot: [] for learner in ended}
    for run in _passes(pieces):
        for piece, outputs in zip(run, company.predict(run), strict=True):
            found[piece.learner.slot].append(outputs)
    for learner in ended:
        learner.add_epoch(torch.cat(found[learner.slot]), partial(stack.save, learner.slot))


def _shown(learners: Sequence[_Learner]) -> dict[str, float]:
    """The mean over tenants of their latest losses."""
    losses = [learner.losses[-1] for learner in learners if learner.losses]
    losses += [
        learner.course.history[-1].training_loss
        for learner in learners
        if not learner.losses and learner.course.history
    ]
    return {"loss": sum(losses) / len(losses)} if losses else {}
