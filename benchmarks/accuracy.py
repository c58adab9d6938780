"""What does looking the lower layers up cost in accuracy, against full fine-tuning of the same base?

Every single run is a file, so the study goes on where it was cut short, today or another day. What is not
finished is missing from the result, which says so.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.accuracy_study.curves import curves
from benchmarks.accuracy_study.execution import Execution
from benchmarks.accuracy_study.methods import (
    ABLATIONS,
    MAIN_METHODS,
    PLAIN,
    SHIPPED,
    FullFineTuning,
    Hierarchical,
    WholeBase,
)
from benchmarks.accuracy_study.plan import BATCH_SIZE, MAX_TOKENS, Plan, expected_seconds, num_epochs
from benchmarks.accuracy_study.records import RunRecords
from benchmarks.accuracy_study.report import StudyReport
from benchmarks.accuracy_study.sets import study_sets
from benchmarks.accuracy_study.stores import StudyStores
from benchmarks.arguments import RESULTS
from benchmarks.recorded_command import recorded_command
from benchmarks.result import BenchmarkResult
from hmi_engine.demo.base_model import packaged_model

__all__ = ["Options", "main", "measure"]

NAME = "accuracy"
QUESTION = (
    "What does looking the lower layers up cost in accuracy, against full fine-tuning of the same base?"
)
NOTES = (
    "Every method sees the same texts, cut off at 64 tokens (tagged sentences are cut into pieces), in "
    "batches of 32 for the same number of epochs, but where a line says more. The development split chooses "
    "the epoch, and on seed 0 the learning rate where there are several; the test split is scored once. The "
    "adapters of rank 64 (sites, dropout, learning rate, table) were chosen by hand on the development "
    "splits of SciERC and NCBI-disease, seed 0.",
    "Full fine-tuning trains all weights by transformers. All other methods leave the base as it is, train "
    "adapters and a head by `Store.train_tenant`, and are scored on what an `Engine` answers.",
    "Taught tenants also learn the probabilities of the fully fine-tuned model of the same seed, on the "
    "training split and on 8,000 training texts of the other sets without their labels: about 1,500 steps, "
    "where all others, full fine-tuning too, take about 550.",
    "Tables hold bigrams of training text only; no text of any development or test split is in one. Training "
    "texts look rows up as if their own fold of the text were not in the table; pieces of cut sentences (6 % "
    "of the training words of SciERC, 10 % of NCBI-disease's) look them up as they are.",
    "In brackets: 95 % percentile bootstrap intervals over test texts (the same draws for every method, so "
    "differences are paired) and over seeds. With three seeds the seeds' part is narrow rather than wide.",
    "Work that was not done: of the tokens times layers of the plain model, those that the engine left out. "
    "Under back-off they are the layers that are looked up; under exact, windows that are not found cost two "
    "tokens through these layers each, once, in the order of the test split.",
)
RUNS = RESULTS / "accuracy_runs"
SEEDS = (0, 1, 2)
DEMO_METHODS = (
    FullFineTuning(candidates=(1e-4,)),
    WholeBase(),
    Hierarchical(3, PLAIN),
    Hierarchical(3, PLAIN, miss="exact"),
)
"""Of the built-in tasks, whose texts differ from machine to machine."""
DEMO_SEEDS = (0, 1)
QUICK_EPOCHS = 2


@dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
        data: folder of sets; None for the documentation of installed packages.
        distilled: folder of distilled bases; None where there are none.
        runs: folder of finished runs; None for a temporary one.
        only: patterns of runs to carry out; all others are left as they are.
        ablations: whether the runs that change one thing each are part of the study.
        scratch: folder that keeps stores for the next time; None for a temporary one.
        report_only: whether nothing is carried out, and what is finished is reported.
        quick: few texts and epochs.
        command: how to repeat the run.
    """

    data: Path | None
    distilled: Path | None
    runs: Path | None
    only: tuple[str, ...]
    ablations: bool
    scratch: Path | None
    report_only: bool
    quick: bool
    command: str


def _plan(options: Options) -> Plan:
    if options.data is None:
        methods, seeds = DEMO_METHODS, DEMO_SEEDS[:1] if options.quick else DEMO_SEEDS
    else:
        methods, seeds = MAIN_METHODS + (ABLATIONS if options.ablations else ()), SEEDS
    return Plan(
        sets=study_sets(options.data, quick=options.quick),
        methods=methods,
        seeds=seeds,
        distilled=options.distilled,
        only=options.only,
    )


def measure(options: Options) -> BenchmarkResult:
    """Carries out what is missing, and reports everything that is finished."""
    with ExitStack() as exits:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory()))
        plan = _plan(options)
        records = RunRecords(options.runs or folder / "runs")
        stores = exits.enter_context(StudyStores(options.scratch or folder / "stores", plan.sets))
        shipped = {
            run.method.plot_layers
            for run in plan.runs(records)
            if isinstance(run.method, Hierarchical) and run.method.base == SHIPPED
        }
        plan = replace(
            plan, shipped={plot_layers: stores.shipped_base(plot_layers) for plot_layers in shipped}
        )
        execution = Execution(packaged_model(), stores, QUICK_EPOCHS if options.quick else None)
        while not options.report_only and (run := plan.next_run(records)) is not None:
            _say(f"{run.name}: about {expected_seconds(run, records):.0f} s")
            record = execution.carry_out(
                run,
                plan.base_folder(run.method),
                teacher_rate=plan.teacher_rate(run.labelled, records),
            )
            records.add(run.name, record)
            _say(f"{run.name}: dev {record.dev:.3f}, {record.cpu_seconds:.0f} s")
    report = StudyReport(plan, records)
    return BenchmarkResult.of(
        options,
        NAME,
        QUESTION,
        settings={
            "seeds": len(plan.seeds),
            "batch_size": BATCH_SIZE,
            "max_tokens": MAX_TOKENS,
            "epochs": {labelled.name: num_epochs(labelled, FullFineTuning()) for labelled in plan.sets},
        },
        notes=NOTES,
        tables=report.tables(),
        curves=curves(report),
    )


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def _list(options: Options) -> None:
    """Prints every run that can be told now, and the hours that are left by what they wait for."""
    plan, records = _plan(options), RunRecords(options.runs or Path("no runs yet"))
    possible, waiting = 0.0, 0.0
    for run in plan.runs(records):
        seconds = expected_seconds(run, records)
        if plan.is_done(run, records):
            state = f"done, dev {records[run.name].dev:.3f}, {records[run.name].cpu_seconds:.0f} s"
        elif plan.is_possible(run, records):
            state, possible = f"about {seconds:.0f} s", possible + seconds
        else:
            state, waiting = "waits for its distilled base or its teacher", waiting + seconds
        print(f"{run.name}: {state}")
    undecided = sum(expected_seconds(run, records) for run in plan.undecided(records))
    print(
        f"hours of one core left: about {possible / 3600:.1f}, {undecided / 3600:.1f} when learning rates "
        f"are chosen, {waiting / 3600:.1f} when distilled bases are there"
    )


def _options(argv: Sequence[str]) -> tuple[Options, argparse.Namespace]:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=QUESTION)
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of sets, NAME/train.txt, dev.txt and test.txt; default: installed documentation",
    )
    parser.add_argument("--distilled", type=Path, help="folder of distilled bases, each a folder")
    parser.add_argument(
        "--runs", type=Path, help=f"folder that keeps the finished runs; with --data, default: {RUNS}"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="carry out only these, such as 'scierc.full-*'",
    )
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, and end")
    parser.add_argument("--report", action="store_true", help="carry out nothing, report what is finished")
    parser.add_argument("--ablations", action="store_true", help="also the runs that change one thing each")
    parser.add_argument("--scratch", type=Path, help="folder that keeps stores and tables for the next time")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="small sizes: proves that it runs, nothing else")
    parsed = parser.parse_args(argv)
    options = Options(
        data=parsed.data,
        distilled=parsed.distilled,
        runs=RUNS if parsed.runs is None and parsed.data is not None else parsed.runs,
        only=tuple(parsed.only),
        ablations=parsed.ablations,
        scratch=parsed.scratch,
        report_only=parsed.report,
        quick=parsed.quick,
        command=recorded_command(NAME, argv),
    )
    return options, parsed


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    options, parsed = _options(sys.argv[1:] if argv is None else argv)
    if parsed.list:
        _list(options)
        return
    measure(options).write(parsed.out)
    print(f"wrote {parsed.out}")


if __name__ == "__main__":
    main()
