"""Tasks of the demo: labels, balance, splits, and a person's own folder."""

import json
from collections import Counter
from pathlib import Path

import pytest

from hmi_engine.demo.tasks import MAX_LABEL_RATIO, DemoData, Task, documentation_data, folder_data
from hmi_engine.errors import InvalidNameError, TrainingDataError
from hmi_engine.knowledge.examples import Example


@pytest.fixture(scope="module")
def data() -> DemoData:
    return documentation_data(num_topics=2, background_words=0, max_train=300, max_test=80)


def test_two_tasks_for_each_topic_under_one_parent(data: DemoData) -> None:
    assert [task.name for task in data.tasks] == [
        "networking/group",
        "networking/kind",
        "formats/group",
        "formats/kind",
    ]
    assert [(domain.name, domain.parent) for domain in data.domains] == [
        ("documentation", "general"),
        ("networking", "documentation"),
        ("formats", "documentation"),
    ]


def test_limits_balance_and_labels(data: DemoData) -> None:
    for task in data.tasks:
        assert len(task.train) == 300 and len(task.test) <= 80
        assert {example.label for example in task.test} <= set(task.labels)
        counts = Counter(example.label for example in task.train).values()
        assert max(counts) < 1.5 * MAX_LABEL_RATIO * min(counts)
        assert task.majority_share < 0.65
    assert data.tasks[1].labels == ("class", "function")


def test_no_text_is_on_both_sides_or_in_a_table(data: DemoData) -> None:
    held_out = {example.text for task in data.tasks for example in task.test}
    assert not held_out & {example.text for task in data.tasks for example in task.train}
    assert not held_out & {text for domain in data.domains for text in domain.texts}


def test_training_texts_are_in_their_domains_corpus(data: DemoData) -> None:
    """Cross-fitting tells by its digest whether a training text was in the table's corpus."""
    corpora = {domain.name: set(domain.texts) for domain in data.domains}
    for task in data.tasks:
        assert {example.text for example in task.train} <= corpora[task.domain] & corpora["documentation"]


def test_documentation_data_is_deterministic(data: DemoData) -> None:
    assert documentation_data(num_topics=2, background_words=0, max_train=300, max_test=80) == data


def test_majority_share() -> None:
    test = tuple(Example(f"text {label} {n}", label, n) for n, label in enumerate("aabbbcc"))
    assert Task("t", "d", "?", (), test).majority_share == pytest.approx(3 / 7)


def write_lines(path: Path, rows: list[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def labelled(prefix: str, count: int) -> list[object]:
    return [{"text": f"{prefix} number {n}", "label": "odd" if n % 2 else "even"} for n in range(count)]


def test_folder_holds_out_a_fifth_and_counts_bad_lines(tmp_path: Path) -> None:
    write_lines(tmp_path / "numbers.jsonl", [*labelled("text", 400), {"text": "no label"}, 3])
    data, num_bad_lines = folder_data(tmp_path)
    (task,) = data.tasks
    assert num_bad_lines == 2
    assert (task.name, task.domain, task.labels) == ("numbers/label", "numbers", ("even", "odd"))
    assert len(task.train) + len(task.test) == 400
    assert 40 <= len(task.test) <= 130
    assert not {example.text for example in task.train} & {example.text for example in task.test}
    assert folder_data(tmp_path) == (data, num_bad_lines)


def test_folder_keeps_a_given_split_and_drops_leaked_texts(tmp_path: Path) -> None:
    write_lines(tmp_path / "set.train.jsonl", [*labelled("train", 50), *labelled("test", 2)])
    write_lines(tmp_path / "set.test.jsonl", labelled("test", 20))
    data, _ = folder_data(tmp_path)
    assert all(example.text.startswith("train") for example in data.tasks[0].train)
    assert len(data.tasks[0].train) == 50 and len(data.tasks[0].test) == 20
    assert set(data.domains[0].texts) == {example.text for example in data.tasks[0].train}


def test_folder_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(TrainingDataError, match=r"no \*\.jsonl file"):
        folder_data(tmp_path)
    write_lines(tmp_path / "one.jsonl", [{"text": f"text {n}", "label": "same"} for n in range(50)])
    with pytest.raises(TrainingDataError, match=r"one/label.*1 label"):
        folder_data(tmp_path)
    (tmp_path / "one.jsonl").unlink()
    write_lines(tmp_path / "bad name.jsonl", labelled("text", 50))
    with pytest.raises(InvalidNameError, match="bad-name"):
        folder_data(tmp_path)
