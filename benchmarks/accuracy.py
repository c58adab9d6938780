"""What does looking the lower layers up cost in accuracy, against full fine-tuning of the same base?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy_execution import Execution
from benchmarks.accuracy_methods import ABLATIONS, MAIN_METHODS
from benchmarks.accuracy_plan import Plan, expected_seconds
from benchmarks.accuracy_records import RunRecords
from benchmarks.accuracy_sets import read_sets
from benchmarks.arguments import RESULTS
from hmi_engine.demo.base_model import packaged_model

__all__ = ["main"]

NAME = "accuracy"
QUESTION = (
    "What does looking the lower layers up cost in accuracy, against full fine-tuning of the same base?"
)
SEEDS = (0, 1, 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=QUESTION)
    parser.add_argument("--data", type=Path, help="folder of sets: NAME/train.txt, dev.txt and test.txt")
    parser.add_argument(
        "--distilled", type=Path, help="folder of distilled bases, such as distilled-k3-window2"
    )
    parser.add_argument(
        "--runs", type=Path, default=RESULTS / "accuracy_runs", help="folder of finished runs"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="PATTERN", help="runs, such as 'scierc.full-*'"
    )
    parser.add_argument("--list", action="store_true", help="say what is done and what is left, and end")
    parser.add_argument("--ablations", action="store_true", help="also the runs that change one thing each")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="small sizes: proves that it runs, nothing else")
    return parser


def _show(plan: Plan, records: RunRecords) -> None:
    left = 0.0
    for run in plan.runs(records):
        seconds = expected_seconds(run, records)
        if run.name in records:
            state = f"done, dev {records[run.name].dev:.3f}, {records[run.name].cpu_seconds:.0f} s"
        elif plan.is_possible(run):
            state, left = f"about {seconds:.0f} s", left + seconds
        else:
            state = f"waits for {plan.base_folder(run.method)}"
        print(f"{run.name}: {state}")
    print(f"about {left / 3600:.1f} hours left, without runs that wait for a base or a learning rate")


def _carry_out(plan: Plan, records: RunRecords, execution: Execution) -> None:
    while (run := plan.next_run(records)) is not None:
        print(f"{run.name}: about {expected_seconds(run, records):.0f} s", file=sys.stderr, flush=True)
        record = execution.carry_out(run)
        records.add(run.name, record)
        print(f"{run.name}: dev {record.dev:.3f}, {record.cpu_seconds:.0f} s", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    options = _parser().parse_args(argv)
    plan = Plan(
        sets=read_sets(options.data),
        methods=(*MAIN_METHODS, *(ABLATIONS if options.ablations else ())),
        seeds=SEEDS,
        distilled=options.distilled,
        only=options.only,
    )
    records = RunRecords(options.runs)
    if options.list:
        _show(plan, records)
        return
    _carry_out(plan, records, Execution(packaged_model()))


if __name__ == "__main__":
    main()
