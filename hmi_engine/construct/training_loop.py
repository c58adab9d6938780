"""The classifier that is trained, and the loop over epochs and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmi_engine.construct.trainable_adapter import AppliedAdapter, TrainableAdapter
from hmi_engine.construct.trainable_layers import DenseBatch, TrainableLayers
from hmi_engine.construct.training_cache import HiddenStateCache
from hmi_engine.construct.training_data import Split, length_batches
from hmi_engine.construct.training_metrics import evaluate
from hmi_engine.construct.training_settings import Epoch, TrainingProgress, TrainingSettings
from hmi_engine.knowledge.heads import ClassificationHead
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.packing import Readout

__all__ = ["FitResult", "TrainableClassifier", "TrainingTask", "fit"]

TRAINING_STAGE = "training"
MAX_GRADIENT_NORM = 1.0
TEXTS_PER_PREDICTION = 64


class TrainableClassifier(nn.Module):
    """An adapter on a frozen base, and a linear head on the pooled result.

    The head starts small, so that all labels are about equally likely.
    """

    def __init__(
        self,
        model: HierarchicalBert,
        adapter: TrainableAdapter,
        num_labels: int,
        pooling: Literal["cls", "mean"],
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.model, self.adapter, self.pooling = model, adapter, pooling
        self.layers = TrainableLayers(model, adapter, pooling)
        size = model.configuration.hidden_size
        self.weight = nn.Parameter(torch.randn(num_labels, size, generator=generator) * 0.02)
        self.bias = nn.Parameter(torch.zeros(num_labels))

    def forward(self, batch: DenseBatch) -> Tensor:
        """One score for each text and label, [B, C], with gradients."""
        return functional.linear(self.layers.pooled(batch), self.weight, self.bias)

    @torch.no_grad()
    def predict(self, states: HiddenStateCache, numbers: Sequence[int]) -> Tensor:
        """Scores float32 [len(numbers), C] through the layers that serve, not those that train."""
        runs = range(0, len(numbers), TEXTS_PER_PREDICTION)
        pooled = [self._served(states, numbers[start : start + TEXTS_PER_PREDICTION]) for start in runs]
        return functional.linear(torch.cat(pooled), self.weight, self.bias)

    def _served(self, states: HiddenStateCache, numbers: Sequence[int]) -> Tensor:
        hidden_states, sequences = states.packed(numbers)
        first, first_only = self.adapter.first_layer, self.pooling == "cls"
        if states.halfway:
            hidden_states, first = self.layers.finish(hidden_states), first + 1
        output = self.model.run_layers(
            hidden_states,
            sequences,
            first=first,
            adapters=AppliedAdapter(self.adapter),
            readout=Readout.select(sequences, [first_only] * sequences.num_sequences),
        )
        if first_only:
            return output  # the readout is the first tokens
        return torch.stack([part.mean(dim=0) for part in output.split(sequences.lengths)])

    def to_head(self, labels: tuple[str, ...]) -> ClassificationHead:
        """A copy of the current head, to store and serve."""
        return ClassificationHead(
            labels, self.weight.detach().clone(), self.bias.detach().clone(), self.pooling
        )


@dataclass(frozen=True)
class TrainingTask:
    """What to learn.

    Attributes:
        states: what of the texts' hidden states the training does not change.
        targets: int64 [S] label numbers of all texts.
        split: which texts to learn from, and which to judge by.
    """

    states: HiddenStateCache
    targets: Tensor
    split: Split


@dataclass(frozen=True)
class FitResult:
    """Every epoch, and which one's parameters the classifier has now."""

    history: tuple[Epoch, ...]
    best_epoch: int


def fit(
    task: TrainingTask,
    classifier: TrainableClassifier,
    settings: TrainingSettings,
    generator: torch.Generator,
    progress: TrainingProgress | None = None,
) -> FitResult:
    """Minimizes the cross-entropy, in place, and leaves the parameters of the best epoch.

    The best epoch has the highest validation accuracy, and the least validation loss among those.

    Args:
        task: what to learn.
        classifier: what is trained.
        settings: of the training.
        generator: orders the batches.
        progress: told after each step.
    """
    steps_per_epoch = -(-len(task.split.training) // settings.batch_size)
    optimizer = _Optimizer(classifier, settings, steps_per_epoch * settings.max_epochs)
    lengths = [len(ids) for ids in task.states.token_ids]
    history: list[Epoch] = []
    best, best_epoch = _copy_of_state(classifier), -1
    while len(history) < settings.max_epochs and not _is_exhausted(history, settings.patience):
        losses = []
        for batch in length_batches(task.split.training, lengths, settings.batch_size, generator):
            with torch.enable_grad():
                loss = functional.cross_entropy(classifier(task.states.dense(batch)), task.targets[batch])
            losses.append(optimizer.step(loss))
            if progress is not None:
                progress(TRAINING_STAGE, optimizer.steps, optimizer.total_steps, _metrics(losses, history))
        history.append(_validate(task, classifier, sum(losses) / len(losses)))
        if best_epoch < 0 or _rank(history[-1]) > _rank(history[best_epoch]):
            best, best_epoch = _copy_of_state(classifier), len(history) - 1
    classifier.load_state_dict(best)
    return FitResult(tuple(history), best_epoch)


def _metrics(losses: list[float], history: list[Epoch]) -> dict[str, float]:
    recent = losses[-10:]
    metrics = {"loss": sum(recent) / len(recent)}
    if history:
        metrics |= {"accuracy": history[-1].accuracy, "macro_f1": history[-1].macro_f1}
    return metrics


def _rank(epoch: Epoch) -> tuple[float, float]:
    return epoch.accuracy, -epoch.validation_loss


def _is_exhausted(history: list[Epoch], patience: int) -> bool:
    """Whether neither measure got better in the last epochs: accuracy alone is coarse on few examples."""
    earlier, recent = history[:-patience], history[-patience:]
    return bool(earlier) and not (
        max(epoch.accuracy for epoch in recent) > max(epoch.accuracy for epoch in earlier)
        or min(epoch.validation_loss for epoch in recent) < min(epoch.validation_loss for epoch in earlier)
    )


def _copy_of_state(classifier: TrainableClassifier) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in classifier.state_dict().items()}


class _Optimizer:
    """AdamW (Loshchilov and Hutter 2019) with linear warm-up, linear decay to zero and clipped gradients."""

    def __init__(self, classifier: TrainableClassifier, settings: TrainingSettings, total_steps: int) -> None:
        self.total_steps, self.steps = total_steps, 0
        self._parameters = list(classifier.parameters())
        groups = [
            {"params": [p for p in self._parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in self._parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(groups, lr=settings.peak_learning_rate)
        warmup = max(1, round(total_steps * settings.warmup_fraction))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adamw,
            lambda step: min((step + 1) / warmup, (total_steps - step) / max(1, total_steps - warmup)),
        )

    def step(self, loss: Tensor) -> float:
        """Follows the gradient of ``loss``; returns its value."""
        self._adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        self._adamw.step()
        self._schedule.step()
        self.steps += 1
        return float(loss.detach())


def _validate(task: TrainingTask, classifier: TrainableClassifier, training_loss: float) -> Epoch:
    scores = classifier.predict(task.states, task.split.validation)
    expected = task.targets[list(task.split.validation)]
    metrics = evaluate(expected.tolist(), scores.argmax(dim=1).tolist(), majority=0)
    return Epoch(
        training_loss=training_loss,
        validation_loss=float(functional.cross_entropy(scores, expected)),
        accuracy=metrics.accuracy,
        macro_f1=metrics.macro_f1,
    )
