"""What a person chooses about a distillation, and what it reports."""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from hmi_engine.construct.bootstrap import MAX_SEED
from hmi_engine.errors import UnsupportedModelError

__all__ = [
    "DistillationProgress",
    "DistillationReport",
    "DistillationSettings",
    "HeldOutLoss",
    "Part",
    "StageReport",
    "StageSettings",
]

Part: TypeAlias = Literal["domain", "merge", "upper"]
"""Layers 0 to K-1, the merge (position table and LayerNorm), layers K to N-1."""


class DistillationProgress(Protocol):
    """Told how far a distillation is."""

    def __call__(
        self, stage: str, done: int, total: int | None, metrics: dict[str, float] | None = None
    ) -> None:
        """Called after each piece of a stage; ``metrics`` hold the recent training ``loss``."""


class StageSettings(BaseModel):
    """One of the two stages.

    Each loss is a mean squared error over the variance of what the teacher has there: 0 is perfect, 1 is no
    better than the teacher's mean.

    Attributes:
        steps: updates of the weights; 0 leaves the stage out.
        trainable: which parts learn; the others stay as they are.
        learning_rate: of the layers, after the warm-up.
        merge_learning_rate: of the merge, which begins further from where it has to be.
        merged_weight: of the loss at the input of layer K.
        upper_weight: of the mean loss over the outputs of layers K to N-1.
        final_weight: of the loss at the output of the last layer alone, in addition.
        relation_weight: of the loss of the value-value relations in the last layer's attention (MiniLM).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(ge=0)
    trainable: tuple[Part, ...] = Field(min_length=1)
    learning_rate: float = Field(default=5e-4, gt=0)
    merge_learning_rate: float = Field(default=2e-3, gt=0)
    merged_weight: float = Field(default=0.0, ge=0)
    upper_weight: float = Field(default=0.0, ge=0)
    final_weight: float = Field(default=0.0, ge=0)
    relation_weight: float = Field(default=0.0, ge=0)

    @property
    def reads_upper_layers(self) -> bool:
        """Whether any loss is taken above the merge."""
        return self.upper_weight > 0 or self.final_weight > 0 or self.relation_weight > 0

    @model_validator(mode="after")
    def _check(self) -> StageSettings:
        if self.merged_weight <= 0 and not self.reads_upper_layers:
            raise ValueError("a stage needs a loss: give one of its weights a value above 0")
        if "upper" in self.trainable and not self.reads_upper_layers:
            raise ValueError("upper layers learn only from losses above the merge: raise upper_weight")
        return self


class DistillationSettings(BaseModel):
    """How a base model is distilled into hierarchical form. The defaults suit some million tokens.

    Attributes:
        stage_1: by default teaches domain layers and merge the teacher's hidden state after layer K - 1.
        stage_2: by default teaches merge and upper layers what the teacher's upper layers give.
        batch_tokens: tokens of a batch, padding included.
        gradient_accumulation: batches of each process whose gradients make one step.
        max_tokens: longer texts are cut into pieces of so many tokens.
        held_out_fraction: share of the text that is never learned from, and measures the loss.
        misses: which n-grams are left out of the table while learning, so that the upper layers accept
            what back-off composes. ``cross_fitted``: those that a table would lack without the text's own
            fold; ``uniform``: any; ``none``.
        miss_range: each sequence draws a share between these two: of the cross-fitted misses, or of all
            n-grams (uniform), which is left out. None: all shares (cross-fitted), 0 to 0.6 (uniform).
        folds: of the cross-fitting.
        min_count: occurrences that an n-gram needs for a row, as in ``add_domain``.
        weight_decay: of AdamW, on matrices only.
        warmup_fraction: share of a stage's steps in which the learning rate rises.
        max_gradient_norm: longer gradients are shortened to it.
        mixed_precision: as ``accelerate`` has it; ``no`` is float32.
        evaluate_every: steps between two measurements of the held-out loss.
        checkpoint_every: steps between two checkpoints.
        cache_bytes: disk for hidden states that do not change; what has no room is computed again.
        seed: the same seed, text and number of threads give the same model, bit for bit, on a CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage_1: StageSettings = StageSettings(steps=1000, trainable=("domain", "merge"), merged_weight=1.0)
    stage_2: StageSettings = StageSettings(
        steps=1000, trainable=("merge", "upper"), learning_rate=3e-4, upper_weight=1.0, final_weight=1.0
    )
    batch_tokens: int = Field(default=2048, ge=8)
    gradient_accumulation: int = Field(default=1, ge=1)
    max_tokens: int = Field(default=128, ge=8)
    held_out_fraction: float = Field(default=0.02, gt=0, lt=1)
    misses: Literal["cross_fitted", "uniform", "none"] = "cross_fitted"
    miss_range: tuple[float, float] | None = None
    folds: int = Field(default=5, ge=2)
    min_count: int = Field(default=2, ge=1)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup_fraction: float = Field(default=0.1, ge=0, lt=1)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    evaluate_every: int = Field(default=100, ge=1)
    checkpoint_every: int = Field(default=50, ge=1)
    cache_bytes: int = Field(default=8 << 30, ge=0)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _check(self) -> DistillationSettings:
        low, high = self.drawn_shares
        if not 0 <= low <= high <= 1:
            raise ValueError(f"miss_range is {self.miss_range}, must be two shares from 0 to 1 in order")
        if not self.stage_1.steps and not self.stage_2.steps:
            raise ValueError("both stages have 0 steps, so nothing would be learned")
        return self

    @property
    def drawn_shares(self) -> tuple[float, float]:
        """``miss_range``, or its default for ``misses``."""
        if self.miss_range is not None:
            return self.miss_range
        return (0.0, 0.6) if self.misses == "uniform" else (0.0, 1.0)

    def for_domain(self) -> DistillationSettings:
        """The same for a domain's own layers: stage 1 alone, the merge stays the base's.

        Raises:
            UnsupportedModelError: stage 1 has no steps.
        """
        if not self.stage_1.steps:
            raise UnsupportedModelError(
                "a domain's layers learn in stage 1 alone, which has 0 steps; give it some (--steps-1)"
            )
        first = StageSettings(**self.stage_1.model_dump() | {"trainable": ("domain",), "merged_weight": 1.0})
        second = StageSettings(**self.stage_2.model_dump() | {"steps": 0})
        return DistillationSettings(**self.model_dump() | {"stage_1": first, "stage_2": second})

    @property
    def stages(self) -> tuple[StageSettings, StageSettings]:
        """Both stages in order."""
        return self.stage_1, self.stage_2


class HeldOutLoss(BaseModel):
    """Loss on text that was held out, each a mean squared error over the teacher's variance.

    Attributes:
        step: updates of the stage so far.
        exact: at the merge and at the output of each upper layer, every n-gram found.
        backoff: the same, where n-grams that the training text does not hold ``min_count`` times are
            composed, as the default miss policy does.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    exact: tuple[float, ...]
    backoff: tuple[float, ...]


class StageReport(BaseModel):
    """Training loss of every step, held-out losses (first: before the stage; last: after it), wall time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    losses: tuple[float, ...]
    held_out: tuple[HeldOutLoss, ...]
    seconds: float


class DistillationReport(BaseModel):
    """What was distilled, from what, and how well.

    Attributes:
        plot_layers: K.
        window: width of the n-gram windows.
        teacher_sha256: digest of the teacher's weights.
        tokenizer_sha256: digest of its tokenizer.
        texts: read, duplicates left out.
        pieces: sequences that were learned from; ``held_out_pieces`` were not.
        tokens: of the former, ``held_out_tokens`` of the latter.
        held_out_miss_rate: share of held-out n-grams that ``backoff`` composes.
        data_sha256: digest of the token ids.
        settings: as they were given.
        stages: both stages.
        seconds: wall time in all, interruptions left out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    plot_layers: int
    window: Literal[2, 3]
    teacher_sha256: str
    tokenizer_sha256: str
    texts: int
    pieces: int
    tokens: int
    held_out_pieces: int
    held_out_tokens: int
    held_out_miss_rate: float
    data_sha256: str
    settings: DistillationSettings
    stages: tuple[StageReport, ...]
    seconds: float
