"""What a person chooses about the training of a tenant, and what the training reports."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from hmi_engine.construct.crossfit import HitRates
from hmi_engine.construct.training_metrics import Metrics
from hmi_engine.knowledge.adapters import MAX_RANK, Site

__all__ = ["DEFAULT_LEARNING_RATES", "Epoch", "TrainingProgress", "TrainingReport", "TrainingSettings"]

DEFAULT_LEARNING_RATES = {"bottleneck": 5e-3, "lora": 2e-3}
"""Peak of the schedule by kind of adapter."""


class TrainingProgress(Protocol):
    """Told how far a training is."""

    def __call__(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        """Called after each piece of a stage.

        Args:
            stage: ``"caching hidden states"`` (in texts) or ``"training"`` (in steps).
            done: how much of the stage is done; early stopping may end it before ``total``.
            total: how much there is.
            metrics: in training, ``loss``, and after the first epoch ``accuracy`` and ``macro_f1`` on the
                validation split.
        """


class TrainingSettings(BaseModel):
    """How a tenant is trained. Every field has a default that suits a thousand short texts.

    Attributes:
        kind: bottleneck adapters (Houlsby et al. 2019) or LoRA (Hu et al. 2021).
        rank: width of each block.
        activation: of bottlenecks.
        layers: which of the layers above ``plot_layers`` get blocks; None for all of them.
        sites: where in a layer; None for after the feed-forward network (bottleneck), query and value (LoRA).
        lora_scale: factor of a LoRA's output (``alpha / r`` in other programs).
        learning_rate: peak of the linear warm-up and decay; None for the kind's default.
        batch_size: texts per step.
        max_epochs: passes over the training split at most.
        patience: the training stops after so many epochs in which neither accuracy nor loss on the
            validation split got better.
        warmup_fraction: share of all steps in which the learning rate rises.
        weight_decay: of AdamW, on matrices only.
        validation_fraction: share of each label's examples that is held out to choose the best epoch.
        max_tokens: longer texts are cut.
        folds: blocks for cross-fitting.
        miss: the policy under which the tenant will be served.
        pooling: what the head reads: the first token, or the mean over tokens.
        seed: makes the result reproducible bit for bit with the same number of threads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["bottleneck", "lora"] = "bottleneck"
    rank: int = Field(default=16, ge=1, le=MAX_RANK)
    activation: str = "gelu"
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    sites: tuple[Site, ...] | None = Field(default=None, min_length=1)
    lora_scale: float = 2.0
    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=32, ge=1)
    max_epochs: int = Field(default=10, ge=1)
    patience: int = Field(default=2, ge=1)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    validation_fraction: float = Field(default=0.15, gt=0, lt=1)
    max_tokens: int = Field(default=128, ge=3)
    folds: int = Field(default=5, ge=2)
    miss: Literal["backoff", "exact"] = "backoff"
    pooling: Literal["cls", "mean"] = "cls"
    seed: int = 0

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.learning_rate or DEFAULT_LEARNING_RATES[self.kind]


class Epoch(BaseModel):
    """One pass: mean training loss, and loss, accuracy and macro-F1 on the validation split after it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    training_loss: float
    validation_loss: float
    accuracy: float
    macro_f1: float


class TrainingReport(BaseModel):
    """What was trained, on what, and how well it does.

    Attributes:
        labels: in the order of the head's rows.
        num_training: examples whose gradients were followed.
        validation: of the best epoch, which was chosen by it; computed through the serving layers.
        test: on test examples, if there were any; they chose nothing.
        history: every epoch.
        best_epoch: index into ``history`` of the state that was kept.
        num_parameters: of adapter and head.
        seconds: wall time of everything.
        hit_rates: of the examples; None without domain layers, or where misses are computed.
        test_hit_rates: of the test examples; those that the domain's corpus holds are cross-fitted too.
        data_sha256: digest of the examples' texts and labels in their order.
        settings: as they were given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: tuple[str, ...]
    num_training: int
    validation: Metrics
    test: Metrics | None
    history: tuple[Epoch, ...]
    best_epoch: int
    num_parameters: int
    seconds: float
    hit_rates: HitRates | None
    test_hit_rates: HitRates | None
    data_sha256: str
    settings: TrainingSettings
