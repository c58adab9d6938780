"""Records of runs of the accuracy study that nobody carried out."""

from benchmarks.accuracy_study.records import LabelOutcomes, RunRecord


def made_record(run, dev=0.5, **changes):
    """The record of ``run`` on a test split of four texts with two labels."""
    values = {
        "set_name": run.labelled.name,
        "method": run.method.slug,
        "seed": run.seed,
        "dev": dev,
        "dev_by_epoch": (dev,),
        "outcomes": LabelOutcomes(answers=(0, 1, 0, 1)),
        "work": None,
        "cpu_seconds": 7.0,
        "settings": {},
        "versions": {},
    }
    return RunRecord(**(values | changes))
