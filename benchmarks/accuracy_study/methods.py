"""The methods that the accuracy study compares: how each makes a model, and its name in files and tables."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hmi_engine.demo.base_model import PACKAGED_PLOT_LAYERS
from hmi_engine.knowledge.row_formats import RowFormat

__all__ = [
    "ABLATIONS",
    "DISTILLED",
    "MAIN_METHODS",
    "PLAIN",
    "RECIPES",
    "SHIPPED",
    "FullFineTuning",
    "Hierarchical",
    "Method",
    "Recipe",
    "TableText",
    "WholeBase",
    "looked_up",
]

PLAIN = "plain"
"""The base as it is, not distilled."""
DISTILLED = "distilled"
SHIPPED = "shipped"
"""A distilled form that the project brings along, from its compact file: windows of two tokens."""

LORA_RATES = (2e-3,)

OTHER_DISTILLATIONS = ("distilled-domain", "distilled-upper", "distilled-complete")
"""By what is trained: domain layers and merge alone, or merge and upper layers alone; and with every n-gram
in the table, where the others leave some out."""

TableText = Literal["quarter", "half", "own", "all"]
"""Training text that a domain's table is built from: shares of the set's own, all of it, that of all sets."""

AdapterKind = Literal["bottleneck", "lora"]


@dataclass(frozen=True)
class FullFineTuning:
    """Every weight of the base is trained, or all above the embeddings and ``frozen_layers`` layers.

    Attributes:
        candidates: learning rates; the development split of seed 0 chooses.
        frozen_layers: those that stay as they are.
        times: it takes so many times the study's steps, at the learning rate that is best in the study's own.
        larger: the learning rate that is tried too where the first candidate is the best.
    """

    candidates: tuple[float, ...] = (3e-4, 1e-4)
    frozen_layers: int = 0
    times: int = 1
    larger: float | None = 6e-4

    @property
    def is_baseline(self) -> bool:
        """Whether all weights are trained in the study's steps: what is compared with, and teaches."""
        return not self.frozen_layers and self.times == 1

    @property
    def slug(self) -> str:
        """Name in files."""
        name = f"upper-from{self.frozen_layers}" if self.frozen_layers else "full"
        return name if self.times == 1 else f"{name}-times{self.times}"

    @property
    def title(self) -> str:
        """Name in tables."""
        if self.frozen_layers:
            return f"fine-tuning of the layers from {self.frozen_layers} on, the rest as it is"
        return "full fine-tuning" if self.times == 1 else f"full fine-tuning, {self.times} times the steps"


@dataclass(frozen=True)
class WholeBase:
    """Adapters on all layers of the frozen base, no table: K = 0.

    Attributes:
        library: whose training: this project's (``hmi``) or PEFT's (``peft``).
        kind: of adapter.
        rank: of the adapter.
        layers: which layers get adapters; None for all of them.
        all_linear: whether LoRA is at every linear layer, not at query and value.
        dropout: of hidden states while the tenant is trained.
        candidates: learning rates; the development split of seed 0 chooses.
    """

    library: Literal["hmi", "peft"] = "hmi"
    kind: AdapterKind = "bottleneck"
    rank: int = 16
    layers: tuple[int, ...] | None = None
    all_linear: bool = False
    dropout: float = 0.0
    candidates: tuple[float, ...] = (5e-3,)

    @property
    def slug(self) -> str:
        """Name in files."""
        chosen = "" if self.layers is None else "-layers" + "".join(map(str, self.layers))
        rank = "" if self.rank == 16 else f"-rank{self.rank}"
        linear = "-linear" if self.all_linear else ""
        dropout = f"-dropout{self.dropout:g}" if self.dropout else ""
        return f"k0-{self.library}-{self.kind}{rank}{chosen}{linear}{dropout}"

    @property
    def title(self) -> str:
        """Name in tables."""
        kinds = {"bottleneck": "bottleneck adapters", "lora": "LoRA"}
        if self.layers is None:
            where = "the whole base"
        else:
            where = f"layers {', '.join(map(str, self.layers))} of the whole base"
        rank = "" if self.rank == 16 else f" of rank {self.rank}"
        linear = " at every linear layer of" if self.all_linear else " on"
        dropout = f", dropout {self.dropout:g}" if self.dropout else ""
        library = " (PEFT)" if self.library == "peft" else ""
        return f"{kinds[self.kind]}{rank}{linear} {where}{dropout}{library}"


@dataclass(frozen=True)
class Hierarchical:
    """Adapters on the upper layers; the layers below are looked up.

    Attributes:
        plot_layers: K.
        base: ``plain``, ``shipped``, or the name of a distilled form.
        miss: how the tenant is trained and served where the table has no row.
        table: what the table is built from.
        window: width of the n-gram windows.
        kind: of adapter.
        rank: of the adapter.
        layers: which upper layers get adapters; None for all of them.
        all_linear: whether LoRA is at every linear layer, as PEFT's ``all-linear``, not at query and value.
        dropout: of hidden states while the tenant is trained.
        min_count: n-grams that are seen less often in the table's text get no row.
        row_format: of the table.
        teacher: whether the tenant learns from the set's fully fine-tuned model too, which labels training
            texts of the other sets for it.
        candidates: learning rates; the development split of seed 0 chooses.
    """

    plot_layers: int
    base: str
    miss: Literal["backoff", "exact"] = "backoff"
    table: TableText = "own"
    window: Literal[2, 3] = 2
    kind: AdapterKind = "bottleneck"
    rank: int = 16
    layers: tuple[int, ...] | None = None
    all_linear: bool = False
    dropout: float = 0.0
    min_count: int = 2
    row_format: RowFormat = "float16"
    teacher: bool = False
    candidates: tuple[float, ...] = (5e-3,)

    @property
    def base_slug(self) -> str:
        """Name of the base's folder: distillation is for a K and a width of windows."""
        return self.base if self.base == PLAIN else f"{self.base}-k{self.plot_layers}-window{self.window}"

    @property
    def slug(self) -> str:
        """Name in files: only what differs from the defaults is named."""
        served = "exact" if self.miss == "exact" else f"backoff-{self.table}"
        parts = [f"k{self.plot_layers}", self.base, served]
        parts += [] if self.window == 2 else [f"window{self.window}"]
        parts += [] if self.kind == "bottleneck" else [self.kind]
        parts += [] if self.rank == 16 else [f"rank{self.rank}"]
        parts += [] if self.layers is None else ["layers" + "".join(map(str, self.layers))]
        parts += ["linear"] if self.all_linear else []
        parts += [f"dropout{self.dropout:g}"] if self.dropout else []
        parts += [] if self.min_count == 2 else [f"count{self.min_count}"]
        parts += [] if self.row_format == "float16" else [self.row_format]
        parts += ["taught"] if self.teacher else []
        return "-".join(parts)

    @property
    def title(self) -> str:
        """Name in tables."""
        texts = {
            "quarter": "table of a quarter of its training text",
            "half": "table of half of its training text",
            "own": "table of its training text",
            "all": "table of all sets' training text",
        }
        base = {PLAIN: "undistilled", SHIPPED: "distilled (as shipped)"}.get(self.base, self.base)
        served = "exact" if self.miss == "exact" else f"back-off, {texts[self.table]}"
        parts = [f"K = {self.plot_layers}", base, served]
        parts += [] if self.window == 2 else [f"windows of {self.window}"]
        parts += [] if self.kind == "bottleneck" else ["LoRA"]
        parts += [] if self.rank == 16 else [f"rank {self.rank}"]
        parts += [] if self.layers is None else ["adapters on layers " + ", ".join(map(str, self.layers))]
        parts += ["every linear layer"] if self.all_linear else []
        parts += [f"dropout {self.dropout:g}"] if self.dropout else []
        least = "once too" if self.min_count == 1 else f"{self.min_count} times"
        parts += [] if self.min_count == 2 else [f"n-grams seen {least}"]
        parts += [] if self.row_format == "float16" else [f"{self.row_format} rows"]
        parts += ["taught by full fine-tuning"] if self.teacher else []
        return ", ".join(parts)


Method = FullFineTuning | WholeBase | Hierarchical


@dataclass(frozen=True)
class Recipe:
    """A method for sets whose texts have a label, and one for sets whose words have tags."""

    title: str
    of_texts: Method
    of_words: Method


# Where only the upper layers have adapters, more of each layer has to be adapted: see docs/accuracy.md.
_WIDE = Hierarchical(3, DISTILLED, kind="lora", rank=32, all_linear=True, candidates=LORA_RATES)
_WIDEST = replace(
    _WIDE, base=SHIPPED, table="all", rank=64, dropout=0.1, min_count=1, candidates=(LORA_RATES[0] / 2,)
)
_TAUGHT = replace(_WIDEST, teacher=True)
_WIDEST_ON_WHOLE_BASE = WholeBase(
    kind=_WIDEST.kind,
    rank=_WIDEST.rank,
    all_linear=_WIDEST.all_linear,
    dropout=_WIDEST.dropout,
    candidates=_WIDEST.candidates,
)
"""What a table costs a tenant: the same adapters, and nothing is looked up."""


def looked_up(plot_layers: int, *, is_distilled: bool = True) -> Hierarchical:
    """The recipe by labels alone for any K: as shipped, or distilled anew; or the base as it is."""
    if not is_distilled:
        return replace(_WIDEST, plot_layers=plot_layers, base=PLAIN)
    base = SHIPPED if plot_layers in PACKAGED_PLOT_LAYERS else DISTILLED
    return replace(_WIDEST, plot_layers=plot_layers, base=base)


def _main_methods() -> tuple[Method, ...]:
    methods: list[Method] = [
        FullFineTuning(),
        FullFineTuning(times=3),
        WholeBase(),
        _WIDEST_ON_WHOLE_BASE,
        _TAUGHT,
        _WIDEST,
        replace(_WIDEST, miss="exact"),
    ]
    for plot_layers in (2, 4):
        other = looked_up(plot_layers)
        methods += [other, replace(other, miss="exact")]
    # What a table finds of a text: of all sets' text above, of less and less text here.
    methods += [replace(_WIDEST, table=table) for table in ("own", "half", "quarter")]
    methods += [looked_up(plot_layers, is_distilled=False) for plot_layers in (3, 2, 4)]
    # What less of an adapter costs: a quarter of the bytes, and the two smallest, the default among them.
    small = replace(_WIDEST, rank=16, all_linear=False, dropout=0.0)
    methods += [
        replace(_WIDEST, rank=16, candidates=(LORA_RATES[0], LORA_RATES[0] / 2)),
        replace(small, candidates=LORA_RATES),
        replace(small, kind="bottleneck", candidates=(5e-3,)),
    ]
    return tuple(methods)


MAIN_METHODS = _main_methods()
"""In the order of their value: the bar and what it is compared with first."""


RECIPES = (
    Recipe("K = 3, as shipped, LoRA of rank 64; tagged sets taught by full fine-tuning", _WIDEST, _TAUGHT),
)
"""What docs/training.md advises, of the methods above; reported where all sets are measured."""


def _ablations() -> tuple[Method, ...]:
    """Each changes one thing about K = 3, distilled anew, served by back-off from the set's own text."""
    base = Hierarchical(3, DISTILLED)
    return (
        base,
        replace(base, base=PLAIN),
        replace(base, miss="exact"),
        _WIDE,
        FullFineTuning(candidates=(1e-3,), frozen_layers=3),
        WholeBase(kind="lora", rank=32, layers=(3, 4, 5), all_linear=True, candidates=LORA_RATES),
        WholeBase(layers=(3, 4, 5)),
        WholeBase(kind="lora", candidates=LORA_RATES),
        WholeBase(library="peft", kind="lora", candidates=LORA_RATES),
        replace(base, window=3),
        replace(base, window=3, miss="exact"),
        *(replace(base, base=name) for name in OTHER_DISTILLATIONS),
        replace(base, layers=(5,)),
        replace(base, layers=(4, 5)),
        replace(base, rank=64),
        replace(base, kind="lora", candidates=LORA_RATES),
        replace(base, min_count=1),
        replace(base, row_format="float32"),
        replace(base, row_format="int8"),
    )


ABLATIONS = _ablations()
