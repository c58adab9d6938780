"""Distils MiniLM into hierarchical form for the accuracy study; the same command goes on where it stopped.

The text is the training text of the study's sets, without labels; what is in a development or test split is
left out. Writes a folder for ``hmi init --general`` and for ``benchmarks.accuracy --distilled``, with the
compact file for ``hmi init --distilled`` beside it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.accuracy_study.methods import DISTILLED, OTHER_DISTILLATIONS, Hierarchical
from benchmarks.accuracy_study.sets import StudySet, read_sets
from benchmarks.accuracy_study.stores import table_texts
from hmi_engine.cli.output import progress_bars
from hmi_engine.construct.distillation_settings import DistillationReport, DistillationSettings
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.store import Store

__all__ = ["distil_base", "main", "settings_of", "unlabelled_texts"]

STEPS = (600, 1400)
"""Of the two stages. The upper layers gain for longer than the domain layers."""
QUICK_STEPS = (2, 2)
EVALUATE_EVERY = 200


def unlabelled_texts(sets: Sequence[StudySet]) -> list[str]:
    """Distinct training texts of all sets, in order, none of which is held out in any of them."""
    return list(table_texts("all", sets[0], sets))


def settings_of(
    variant: str, steps: tuple[int, int], mixed_precision: str, seed: int
) -> DistillationSettings:
    """The settings of a variant: ``distilled``, or one of those that leave something out."""
    usual = DistillationSettings()
    first, second = (
        stage.model_copy(update={"steps": count}) for stage, count in zip(usual.stages, steps, strict=True)
    )
    if variant == "distilled-domain":
        second = second.model_copy(update={"steps": 0})
    elif variant == "distilled-upper":
        first = first.model_copy(update={"steps": 0})
    return DistillationSettings.model_validate(
        usual.model_dump()
        | {
            "stage_1": first.model_dump(),
            "stage_2": second.model_dump(),
            "misses": "none" if variant == "distilled-complete" else usual.misses,
            "mixed_precision": mixed_precision,
            "evaluate_every": EVALUATE_EVERY,
            "seed": seed,
        }
    )


def distil_base(
    base: Path,
    out: Path,
    texts: Sequence[str],
    settings: DistillationSettings,
    *,
    plot_layers: int,
    window: int,
    progress: Callable[..., None] | None = None,
) -> DistillationReport:
    """Distils the model in the folder ``base`` into the folder ``out``, or goes on with it.

    Checkpoints and the store that is distilled are in ``out`` with ``.work`` behind its name.
    """
    work = out.with_name(out.name + ".work")
    path = work / "store"
    if path.exists():
        store = Store.open(path)
    else:
        store = Store.create(path, general=base, plot_layers=plot_layers, window=3 if window == 3 else 2)
    with store:
        return store.distill(
            texts,
            settings=settings,
            folder=work / "checkpoints",
            export=out,
            compact=out.with_suffix(".safetensors"),
            progress=progress,
        )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distil", description=__doc__)
    parser.add_argument("bases", type=Path, help="folder of distilled bases, which gets one more")
    parser.add_argument("--data", type=Path, required=True, help="folder of labelled sets")
    parser.add_argument("--variant", choices=(DISTILLED, *OTHER_DISTILLATIONS), default=DISTILLED)
    parser.add_argument("--plot-layers", type=int, default=3, help="K: layers that are looked up")
    parser.add_argument("--window", type=int, choices=(2, 3), default=2, help="tokens of an n-gram")
    parser.add_argument("--steps", type=int, nargs=2, default=None, help=f"of both stages; default {STEPS}")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few steps: proves that it runs, nothing else")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Distils and says how far student and teacher are apart on held-out text."""
    options = _parse(sys.argv[1:] if argv is None else argv)
    steps = QUICK_STEPS if options.quick else STEPS
    if options.steps is not None:
        steps = options.steps[0], options.steps[1]
    name = Hierarchical(options.plot_layers, options.variant, window=options.window).base_slug
    with progress_bars() as progress:
        report = distil_base(
            packaged_model(),
            options.bases / name,
            unlabelled_texts(read_sets(options.data)),
            settings_of(options.variant, steps, options.mixed_precision, options.seed),
            plot_layers=options.plot_layers,
            window=options.window,
            progress=progress,
        )
    print(f"{name}: {report.tokens} tokens, {report.seconds:.0f} s; missed of the teacher's variance:")
    for number, stage in enumerate(report.stages, start=1):
        for point in stage.held_out:
            print(
                f"stage {number}, {point.step} steps: exact {point.exact[0]:.3f} at the merge, "
                f"{point.exact[-1]:.3f} at the end; back-off {point.backoff[0]:.3f}, {point.backoff[-1]:.3f}"
            )


if __name__ == "__main__":
    main()
