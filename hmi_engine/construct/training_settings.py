"""What a person chooses about the training of a tenant, and what the training reports."""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hmi_engine.construct.bootstrap import MAX_SEED
from hmi_engine.construct.crossfit import HitRates
from hmi_engine.construct.training_metrics import Metrics
from hmi_engine.knowledge.adapters import LORA_SITES, MAX_RANK, Site
from hmi_engine.knowledge.examples import Task

__all__ = [
    "ADAPTER_KINDS",
    "DEFAULT_LEARNING_RATES",
    "AdapterKind",
    "Epoch",
    "SearchReport",
    "TeacherReport",
    "TrainingProgress",
    "TrainingReport",
    "TrainingSettings",
    "Trial",
]

AdapterKind = Literal["bottleneck", "seq_bn", "double_seq_bn", "lora", "ia3", "bitfit"]
"""``seq_bn`` is ``bottleneck``; ``double_seq_bn`` has a second one behind the attention."""

ADAPTER_KINDS: tuple[AdapterKind, ...] = ("bottleneck", "seq_bn", "double_seq_bn", "lora", "ia3", "bitfit")

DEFAULT_LEARNING_RATES = {"bottleneck": 5e-3, "lora": 2e-3, "ia3": 1e-2, "bitfit": 5e-3}
"""Peak of the schedule by kind of block."""

_HOULSBY_SITES = (Site.AFTER_ATTENTION, Site.AFTER_FFN)


class TrainingProgress(Protocol):
    """Told how far a training is."""

    def __call__(self, stage: str, done: int, total: int, metrics: dict[str, float]) -> None:
        """Called after each piece of a stage.

        Args:
            stage: ``"asking the teacher"`` or ``"caching hidden states"`` (in texts), ``"searching"`` (in
                trials) or ``"training"`` (in steps).
            done: how much of the stage is done; early stopping may end it before ``total``.
            total: how much there is.
            metrics: in training, ``loss``, and after the first epoch the task's figures on the validation
                split.
        """


class TrainingSettings(BaseModel):
    """How a tenant is trained. Every field has a default that suits short texts.

    Attributes:
        task: what is learned; the examples are of its type.
        kind: ``bottleneck`` or ``seq_bn`` (Pfeiffer et al. 2020), ``double_seq_bn`` (Houlsby et al. 2019),
            ``lora`` (Hu et al. 2021), ``ia3`` (Liu et al. 2022) or ``bitfit`` (Ben Zaken et al. 2021).
        rank: width of each block, of bottlenecks and LoRA.
        activation: of bottlenecks.
        layers: which of the layers above ``plot_layers`` get blocks; None for all of them.
        sites: where in a layer; None for the kind's usual ones: after the feed-forward network (bottleneck),
            query and value (LoRA), keys, values and the feed-forward network's inner state (IA3), all biases.
            ``"all-linear"``: LoRA at every linear layer, as in PEFT.
        lora_scale: factor of a LoRA's output, unless ``lora_alpha`` is given.
        lora_alpha: PEFT's ``lora_alpha``: the factor is this over the rank; None for ``lora_scale``.
        use_rslora: whether it is over the rank's square root (Kalajdzievski 2023).
        learning_rate: peak of the linear warm-up and decay; None for the kind's default.
        batch_size: examples per step; None for 32, or fewer where examples are few
            (:class:`hmi_engine.construct.training_schedule.Schedule`).
        max_epochs: passes over the training split at most; None for 10, or more where examples are few.
        patience: the training stops after so many epochs in which neither accuracy nor loss on the
            validation split got better; None for a fifth of ``max_epochs``.
        warmup_fraction: share of all steps in which the learning rate rises.
        weight_decay: of AdamW, on matrices only.
        validation_fraction: share of each label's examples that is held out to choose the best epoch; a
            label's only example is not.
        max_tokens: longer texts are cut.
        folds: blocks for cross-fitting.
        miss: the policy under which the tenant will be served.
        pooling: what a head of whole texts reads: the first token, or the mean over tokens; None for the
            task's usual one.
        class_weights: ``"balanced"`` weighs labels in the loss so that rare ones count as much as frequent
            ones, as scikit-learn's ``class_weight``; None weighs all examples alike.
        dropout: share of hidden states' elements that are left out at random in each step, between layers and
            before the head (Srivastava et al. 2014).
        label_smoothing: share of each target that is spread over all labels (Szegedy et al. 2016).
        teacher_weight: where there is a teacher, the share of a labelled text's loss that follows it and not
            the label; of texts without a label all of it does.
        seed: makes the result reproducible bit for bit with the same number of threads.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task = "classification"
    kind: AdapterKind = "bottleneck"
    rank: int = Field(default=16, ge=1, le=MAX_RANK)
    activation: str = "gelu"
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    sites: Annotated[tuple[Site, ...], Field(min_length=1)] | Literal["all-linear"] | None = None
    lora_scale: float = 2.0
    lora_alpha: float | None = Field(default=None, gt=0)
    use_rslora: bool = False
    learning_rate: float | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, ge=1)
    max_epochs: int | None = Field(default=None, ge=1)
    patience: int | None = Field(default=None, ge=1)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    validation_fraction: float = Field(default=0.15, gt=0, lt=1)
    max_tokens: int = Field(default=128, ge=3)
    folds: int = Field(default=5, ge=2)
    miss: Literal["backoff", "exact"] = "backoff"
    pooling: Literal["cls", "mean"] | None = None
    class_weights: Literal["balanced"] | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    teacher_weight: float = Field(default=0.5, ge=0, le=1)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _check_fields(self) -> TrainingSettings:
        if self.sites == "all-linear" and self.kind != "lora":
            raise ValueError(f"sites 'all-linear' is for lora, not for {self.kind}")
        if self.use_rslora and self.lora_alpha is None:
            raise ValueError("use_rslora divides lora_alpha, which is not given")
        if self.task in ("embedding", "regression"):
            for name in ("class_weights", "label_smoothing"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for tasks with labels, and {self.task} has none")
        return self

    def pooling_or(self, usual: Literal["cls", "mean"]) -> Literal["cls", "mean"]:
        """What a head of whole texts reads: as it was set, or else as is usual for the task."""
        return usual if self.pooling is None else self.pooling

    @property
    def block_kind(self) -> str:
        """The kind of the blocks, a key of ``hmi_engine.knowledge.adapters.KINDS``."""
        return "bottleneck" if self.kind in ("seq_bn", "double_seq_bn") else self.kind

    @property
    def block_sites(self) -> tuple[Site, ...] | None:
        """Where in a layer blocks are; None for the usual sites of :attr:`block_kind`."""
        if self.sites == "all-linear":
            return LORA_SITES
        return _HOULSBY_SITES if self.kind == "double_seq_bn" and self.sites is None else self.sites

    @property
    def block_scale(self) -> float:
        """Factor of a LoRA's output."""
        if self.lora_alpha is None:
            return self.lora_scale
        return self.lora_alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        return self.learning_rate or DEFAULT_LEARNING_RATES[self.block_kind]


class Epoch(BaseModel):
    """One pass: mean training loss, and loss and the task's figures on the validation split after it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    training_loss: float
    validation_loss: float
    metrics: dict[str, float]


class Trial(BaseModel):
    """A candidate of a search, trained for ``steps`` in one of its rounds.

    ``value`` is the figure by which the best is chosen, on the validation split, as is the loss; both are
    None where the training's loss became infinite or NaN.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    learning_rate: float
    rank: int
    steps: int
    value: float | None = None
    validation_loss: float | None = None


class SearchReport(BaseModel):
    """Every trial of a search that had ``budget_steps`` in all, judged by the figure ``best_by``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    best_by: str
    budget_steps: int
    trials: tuple[Trial, ...]


class TeacherReport(BaseModel):
    """Whom a tenant learned from, and how well that model does where the tenant was judged.

    Attributes:
        sha256: digest of the teacher's weights.
        num_unlabelled: texts without a label of which it said something.
        texts_sha256: digest of these texts in their order; None where there were none.
        validation: the teacher's figures on the validation examples.
        test: on the test examples, if there were any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: str
    num_unlabelled: int
    texts_sha256: str | None
    validation: Metrics
    test: Metrics | None


class TrainingReport(BaseModel):
    """What was trained, on what, and how well it does.

    Attributes:
        labels: in the order of the head's rows; none for embeddings.
        best_by: the figure that chose the best epoch.
        num_training: labelled examples whose gradients were followed.
        num_cut: texts of the training and validation examples that were longer than ``max_tokens``.
        unvalidated_labels: classes that no validation example has, as one with a single example.
        validation: of the best epoch, which was chosen by it; computed through the serving layers.
        test: on test examples, if there were any; they chose nothing.
        test_num_cut: texts of the test examples that were longer than ``max_tokens``.
        history: every epoch.
        best_epoch: index into ``history`` of the state that was kept.
        divergence: where the loss became infinite or NaN, which ended the training; None if it did not.
        num_parameters: of adapter and head.
        seconds: wall time of everything.
        hit_rates: of the examples; None without domain layers, or where misses are computed.
        test_hit_rates: of the test examples; those that the domain's corpus holds are cross-fitted too.
        data_sha256: digest of the examples in their order, those of a validation set after the others.
        test_sha256: digest of the test examples.
        settings: as they were given, with batch size, epochs and patience as they were if that was left open,
            and with the learning rate and rank that a search found.
        search: its trials; None where there was none.
        teacher: whom the tenant learned from; None where that were labels alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: tuple[str, ...]
    best_by: str
    num_training: int
    num_cut: int
    unvalidated_labels: tuple[str, ...] = ()
    validation: Metrics
    test: Metrics | None
    test_num_cut: int
    history: tuple[Epoch, ...]
    best_epoch: int
    divergence: str | None
    num_parameters: int
    seconds: float
    hit_rates: HitRates | None
    test_hit_rates: HitRates | None
    data_sha256: str
    test_sha256: str | None
    settings: TrainingSettings
    search: SearchReport | None = None
    teacher: TeacherReport | None = None
