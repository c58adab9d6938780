"""The accuracy study carries out what is missing, and says of what is there what it is worth."""

import pytest
from accuracy_records import made_record
from conftest import write_jsonl

import benchmarks.accuracy as accuracy
import benchmarks.accuracy_study.report as report_module
from benchmarks.accuracy_study.curves import curves
from benchmarks.accuracy_study.methods import PLAIN, FullFineTuning, Hierarchical, Recipe, WholeBase
from benchmarks.accuracy_study.plan import Plan
from benchmarks.accuracy_study.records import LabelOutcomes, RunRecords, TagOutcomes, Work
from benchmarks.accuracy_study.report import StudyReport
from benchmarks.accuracy_study.sets import ClassificationSet, TaggingSet, demo_sets
from hmi_engine.demo.tasks import DemoData, Task
from hmi_engine.knowledge.examples import Example, TaggedExample

FULL, LOOKED_UP = FullFineTuning(candidates=(1e-4,)), Hierarchical(3, PLAIN)


def write_sets(folder, make_sentences):
    """A set whose label, and one whose tags, are told by single words."""
    for split, count, seed in (("train", 96, 3), ("dev", 32, 4), ("test", 32, 5)):
        texts = make_sentences(count, seed=seed, longest=8)
        for name in ("labels", "tags"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        lines = [{"text": text, "label": "the" if "the" in text.split() else "none"} for text in texts]
        write_jsonl(folder / "labels" / f"{split}.txt", lines)
        tagged = (
            "".join(f"{word} {'B-The' if word == 'the' else 'O'}\n" for word in text.split())
            for text in texts
        )
        (folder / "tags" / f"{split}.txt").write_text("\n".join(tagged))


@pytest.fixture
def options(tmp_path, make_sentences):
    write_sets(tmp_path / "data", make_sentences)
    return accuracy.Options(
        data=tmp_path / "data",
        distilled=None,
        runs=tmp_path / "runs",
        only=(),
        ablations=False,
        scratch=None,
        report_only=False,
        quick=True,
        command="test",
    )


def test_every_method_on_both_kinds_of_sets(options, tiny_bert, monkeypatch):
    methods = (
        FULL,
        WholeBase(library="peft", kind="lora"),
        WholeBase(),
        LOOKED_UP,
        Hierarchical(2, PLAIN, miss="exact"),
        Hierarchical(2, PLAIN, teacher=True),
    )
    monkeypatch.setattr(accuracy, "packaged_model", lambda: tiny_bert)
    monkeypatch.setattr(accuracy, "MAIN_METHODS", methods)
    monkeypatch.setattr(accuracy, "SEEDS", (0,))
    result = accuracy.measure(options)
    scores = result.tables[0]
    assert [row[0] for row in scores.rows] == [method.title for method in methods]
    assert scores.columns == ("method", "labels: accuracy", "tags: entity F1", "mean")
    assert all(all(row) for row in scores.rows)
    records = RunRecords(options.runs)
    assert len(records.values()) == 2 * len(methods)
    for record in records.values():
        looked_up = record.method.startswith(("k2", "k3"))
        assert (record.work is not None) == looked_up
    # Nothing is done twice.
    monkeypatch.setattr(accuracy.Execution, "carry_out", None)
    assert accuracy.measure(options).tables == result.tables


@pytest.mark.slow
def test_the_built_in_tasks(tmp_path):
    accuracy.main(["--quick", "--out", str(tmp_path / "out.json")])
    assert (tmp_path / "out.json").exists()


def test_built_in_tasks_get_a_development_split_of_their_own():
    train, test = (
        tuple(Example(f"{name} {number}", "ab"[number % 2]) for number in range(30))
        for name in ("train", "test")
    )
    data = DemoData("made up", (), (Task("domain/kind", "domain", "which", train, test),))
    (labelled,) = demo_sets(data)
    assert labelled.name == "domain-kind" and labelled.test == test
    assert len(labelled.dev) == 5 and {*labelled.train, *labelled.dev} == {*train}
    assert not {*labelled.train} & {*labelled.dev}


@pytest.fixture
def study(tmp_path):
    """Two sets of four test texts, two methods, two seeds; nothing is finished."""
    examples = tuple(Example(f"text {number}", "ab"[number % 2], number) for number in range(4))
    sentences = tuple(TaggedExample(("a", "b"), ("B-X", "O")) for _ in range(4))
    sets = [ClassificationSet("labels", *[examples] * 3), TaggingSet("tags", *[sentences] * 3)]
    plan = Plan(sets=sets, methods=(FULL, LOOKED_UP), seeds=(0, 1), distilled=None)
    return plan, RunRecords(tmp_path / "runs")


WORK = Work(tokens=100, plot_layers=3, num_layers=6, hit_rate=0.8, computed_tokens=40)


def finish(plan, records, method, set_name, seed, outcomes):
    runs = [
        run
        for run in plan.runs(records)
        if (run.method, run.labelled.name, run.seed) == (method, set_name, seed)
    ]
    (run,) = runs
    work = WORK if isinstance(method, Hierarchical) else None
    records.add(run.name, made_record(run, outcomes=outcomes, work=work))


def test_tables_of_what_is_there(study):
    plan, records = study
    for seed in (0, 1):
        finish(plan, records, FULL, "labels", seed, LabelOutcomes(answers=(0, 1, 0, 1)))
    finish(plan, records, LOOKED_UP, "labels", 0, LabelOutcomes(answers=(0, 1, 0, 0)))
    tables = {table.title: table for table in StudyReport(plan, records).tables()}
    full, looked_up = tables["Scores on the test splits, %"].rows
    assert full[1:] == ("100.0 (100.0 to 100.0)", "", "")
    assert looked_up[1].startswith("75.0 (") and looked_up[1].endswith("1 of 2 seeds")
    (difference,) = tables["Difference from full fine-tuning, points"].rows
    assert difference[1].startswith("-25.0 (") and difference[2:] == ("", "")
    assert tables["Macro-F1 on the test splits, %"].rows[1][1].startswith("73.3 (")
    (work,) = tables["Work that was not done, % of the plain model's layers (hit rate of windows, %)"].rows
    assert work[1:] == ("30 (80)", "")
    missing = tables["Missing: seeds that are done"].rows
    assert [row[1:] for row in missing] == [("2 of 2", "0 of 2"), ("1 of 2", "0 of 2")]


def test_a_recipe_takes_each_set_as_it_says(study, monkeypatch):
    plan, records = study
    recipes = (Recipe("both", FULL, LOOKED_UP), Recipe("unfinished", LOOKED_UP, FULL))
    monkeypatch.setattr(report_module, "RECIPES", recipes)
    for seed in (0, 1):
        finish(plan, records, FULL, "labels", seed, LabelOutcomes(answers=(0, 1, 0, 0)))
        finish(plan, records, LOOKED_UP, "tags", seed, TagOutcomes(entities=((1, 1, 1),) * 4))
    scores = StudyReport(plan, records).tables()[0]
    assert [row[0] for row in scores.rows] == [FULL.title, LOOKED_UP.title, "both"]
    both = scores.rows[-1]
    assert both[1].startswith("75.0 (") and both[2] == "100.0 (100.0 to 100.0)"
    assert both[3].startswith("87.5 (")


def test_means_need_every_set(study):
    plan, records = study
    for name, right, wrong in (
        ("labels", LabelOutcomes(answers=(0, 1, 0, 1)), LabelOutcomes(answers=(0, 1, 0, 0))),
        ("tags", TagOutcomes(entities=((1, 1, 1),) * 4), TagOutcomes(entities=((1, 1, 1),) * 4)),
    ):
        report = StudyReport(plan, records)
        assert report.lost_points(LOOKED_UP, report.common_seeds([LOOKED_UP])) is None
        for seed in (0, 1):
            finish(plan, records, FULL, name, seed, right)
            finish(plan, records, LOOKED_UP, name, seed, wrong)
    report = StudyReport(plan, records)
    seeds = report.common_seeds([LOOKED_UP])
    assert seeds == {"labels": {0, 1}, "tags": {0, 1}}
    assert report.lost_points(LOOKED_UP, seeds).value == pytest.approx(12.5)
    one = {name: frozenset({1}) for name in seeds}
    assert report.lost_points(LOOKED_UP, one).value == pytest.approx(12.5)
    assert report.hit_rates(LOOKED_UP) == [0.8, 0.8]
    assert "Missing: seeds that are done" not in {table.title for table in report.tables()}
    assert curves(report) == []
