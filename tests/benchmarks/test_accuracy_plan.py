"""The accuracy study does what is missing, once, in order, and takes learning rates from the dev split."""

from dataclasses import replace

import pytest
from accuracy_records import made_record

from benchmarks.accuracy_study.methods import (
    ABLATIONS,
    MAIN_METHODS,
    PLAIN,
    SHIPPED,
    FullFineTuning,
    Hierarchical,
)
from benchmarks.accuracy_study.plan import (
    Plan,
    Run,
    base_identity,
    expected_seconds,
    num_epochs,
    run_name,
    taught_epochs,
)
from benchmarks.accuracy_study.records import RunRecords
from benchmarks.accuracy_study.sets import ClassificationSet
from hmi_engine.knowledge.examples import Example

FULL = FullFineTuning(candidates=(1e-4, 5e-5), larger=None)
LONG = replace(FULL, times=3)
LOOKED_UP = Hierarchical(3, PLAIN)
DISTILLED = Hierarchical(3, "distilled")


def made_set(name, num_train=320):
    examples = tuple(Example(f"text {number}", "ab"[number % 2], number) for number in range(num_train))
    return ClassificationSet(name, examples, examples[:4], examples[:4])


def made_plan(methods=(FULL, LOOKED_UP), sets=("one", "two"), **changes):
    fields = {"seeds": (0, 1), "distilled": None} | changes
    return Plan(sets=[made_set(name) for name in sets], methods=methods, **fields)


@pytest.fixture
def records(tmp_path):
    return RunRecords(tmp_path / "runs")


def carry_out(plan, records, dev=lambda run: 0.5):
    names = []
    while (run := plan.next_run(records)) is not None:
        records.add(run.name, made_record(run, dev(run)))
        names.append(run.name)
    return names


def test_every_run_once_and_seed_0_first(records):
    names = carry_out(made_plan(), records, dev=lambda run: 0.9 if run.learning_rate == 5e-5 else 0.5)
    assert names == [
        "one.full-lr0.0001.seed0",
        "two.full-lr0.0001.seed0",
        "one.full-lr5e-05.seed0",
        "two.full-lr5e-05.seed0",
        "one.k3-plain-backoff-own-lr0.005.seed0",
        "two.k3-plain-backoff-own-lr0.005.seed0",
        "one.full-lr5e-05.seed1",
        "two.full-lr5e-05.seed1",
        "one.k3-plain-backoff-own-lr0.005.seed1",
        "two.k3-plain-backoff-own-lr0.005.seed1",
    ]


def test_a_later_process_goes_on(records, tmp_path):
    plan = made_plan()
    for _ in range(3):
        run = plan.next_run(records)
        records.add(run.name, made_record(run))
    again = RunRecords(tmp_path / "runs")
    assert again.values() == records.values() and len(again.values()) == 3
    assert len(carry_out(plan, again)) == 10 - 3
    assert carry_out(plan, RunRecords(tmp_path / "runs")) == []


def test_the_dev_split_chooses_the_learning_rate_of_each_set(records):
    def dev(run):
        return 0.9 if (run.labelled.name == "two") == (run.learning_rate == 5e-5) else 0.5

    plan = made_plan(methods=(FULL,))
    carry_out(plan, records, dev)
    one, two = plan.sets
    assert (plan.chosen_rate(one, FULL, records), plan.chosen_rate(two, FULL, records)) == (1e-4, 5e-5)
    assert plan.finished(two, FULL, records) == [run_name(two, FULL, 5e-5, seed) for seed in (0, 1)]


def test_rates_with_every_seed_are_compared_by_all_of_them(records):
    """One seed's development split decides among rates only until another rate has been measured as well."""
    scores = {(1e-4, 0): 0.8, (5e-5, 0): 0.81, (5e-5, 1): 0.7, (2e-5, 0): 0.6}
    full = replace(FULL, candidates=(1e-4, 5e-5, 2e-5))
    plan = made_plan(methods=(full,), sets=("one",))
    carry_out(plan, records, dev=lambda run: scores[run.learning_rate, run.seed])
    (labelled,) = plan.sets
    assert plan.chosen_rate(labelled, full, records) == 5e-5
    for rate, dev in ((2e-5, 0.99), (1e-4, 0.75)):
        run = Run(labelled, full, rate, 1)
        records.add(run.name, made_record(run, dev))
    assert plan.chosen_rate(labelled, full, records) == 2e-5
    run = Run(labelled, full, 2e-5, 1)
    records.add(run.name, made_record(run, 0.9))
    assert plan.chosen_rate(labelled, full, records) == 1e-4, "0.775 of both seeds, 0.755 and 0.75"
    assert carry_out(plan, records) == []


def test_where_the_largest_learning_rate_is_the_best_a_larger_one_is_tried(records):
    full = replace(FULL, larger=6e-4)
    plan = made_plan(methods=(full,))
    names = carry_out(plan, records, dev=lambda run: {1e-4: 0.5, 6e-4: 0.6}.get(run.learning_rate, 0.4))
    assert names[-4:-2] == ["one.full-lr0.0006.seed0", "two.full-lr0.0006.seed0"]
    assert all(plan.chosen_rate(labelled, full, records) == 6e-4 for labelled in plan.sets)


def test_more_steps_are_taken_at_the_rate_that_was_best(records):
    plan = made_plan(methods=(LONG, FULL), sets=("one",))
    names = carry_out(plan, records, dev=lambda run: 0.9 if run.learning_rate == 5e-5 else 0.5)
    assert names == [
        "one.full-lr0.0001.seed0",
        "one.full-lr5e-05.seed0",
        "one.full-times3-lr5e-05.seed0",
        "one.full-times3-lr5e-05.seed1",
        "one.full-lr5e-05.seed1",
    ]
    assert plan.teacher_rate(plan.sets[0], records) == 5e-5


def test_seeds_that_wait_for_a_learning_rate(records):
    plan = made_plan(sets=("one",))
    assert [run.name for run in plan.undecided(records)] == ["one.full-lr0.0001.seed1"]
    carry_out(plan, records)
    assert plan.undecided(records) == []


def test_patterns_leave_the_rest_out(records):
    names = carry_out(made_plan(only=("two.full-*", "*.k3-*.seed0")), records)
    assert len(names) == 2 + 1 + 2 and not any(name.startswith("one.full") for name in names)


def test_the_shipped_base_is_not_waited_for(records, tmp_path):
    method = Hierarchical(3, SHIPPED)
    plan = made_plan(methods=(method,), sets=("one",))
    assert plan.is_possible(plan.next_run(records), records)
    folder = tmp_path / "general"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    made = replace(plan, shipped={3: folder})
    run = made.next_run(records)
    assert made.base_folder(run.method) == folder and run.name.startswith("one.k3-shipped-backoff-own-lr")
    records.add(run.name, made_record(run, base=base_identity(folder)))
    assert made.is_done(run, records) and plan.is_done(run, records)
    assert not replace(made, shipped={3: tmp_path}).is_done(run, records), "another base is another run"


def test_a_teacher_waits_for_the_best_full_fine_tuning(records, tmp_path):
    taught = replace(LOOKED_UP, teacher=True)
    plan = made_plan(methods=(taught, FULL), sets=("one",), seeds=(0,))
    (labelled,) = plan.sets
    assert plan.teacher_rate(labelled, records) is None
    names = carry_out(plan, records, dev=lambda run: 0.9 if run.learning_rate == 5e-5 else 0.5)
    assert [name.split(".")[1].split("-")[0] for name in names] == ["full", "full", "k3"]
    assert plan.teacher_rate(labelled, records) == 5e-5
    assert not plan.is_possible(plan.runs(records)[0], RunRecords(tmp_path / "others"))


def test_distilled_bases_are_waited_for_and_told_apart(records, tmp_path):
    plan = made_plan(methods=(DISTILLED,), sets=("one",), distilled=tmp_path)
    assert plan.next_run(records) is None
    assert len(plan.runs(records)) == 2
    folder = tmp_path / "distilled-k3-window2"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    run = plan.next_run(records)
    records.add(run.name, made_record(run, base="another distillation"))
    assert plan.next_run(records) == run
    records.add(run.name, made_record(run, base=base_identity(folder)))
    assert plan.next_run(records).seed == 1
    # Without the folder, what was measured with it still counts.
    assert made_plan(methods=(DISTILLED,), sets=("one",)).is_done(run, records)


def test_epochs_and_costs(records):
    assert num_epochs(made_set("small", 320), FULL) == 10
    assert num_epochs(made_set("large", 7320), LOOKED_UP) == 3
    assert num_epochs(made_set("large", 7320), LONG) == 9
    assert taught_epochs(made_set("small", 320), 8000) == 6
    assert taught_epochs(made_set("large", 7320), 8000) == 3
    plan = made_plan()
    run = plan.next_run(records)
    assert expected_seconds(run, records) == 10 * 10 * 1.5
    records.add(run.name, made_record(run))
    assert expected_seconds(run, records) == 7


def test_methods_have_names_of_their_own():
    methods = (*MAIN_METHODS, *ABLATIONS)
    assert (
        len({method.slug for method in methods}) == len({method.title for method in methods}) == len(methods)
    )
