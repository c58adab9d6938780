"""Examples of every task, from JSON lines, tables and columns of words and tags."""

import csv
import io
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.corpus_examples import stream_examples, stream_task_examples
from hmi_engine.knowledge.corpus_report import CorpusReport
from hmi_engine.knowledge.examples import (
    Example,
    MultiLabelExample,
    PairExample,
    RegressionExample,
    ScoredPairExample,
    TaggedExample,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), min_size=1).filter(
    str.strip
)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(rows):
    return "\n".join(map(json.dumps, rows))


def read(path, task="classification", **options):
    return list(stream_task_examples(path, task, **options))


@pytest.mark.parametrize(("label", "text"), [("x", "x"), (1, "1"), (True, "true")])
def test_labels_become_text(tmp_path, label, text):
    good = [{"text": "a", "label": label}]
    bad = [
        {"text": "d"},
        {"text": "d", "label": None},
        {"text": "d", "label": 0.5},
        {"text": "d", "label": ""},
    ]
    path = write(tmp_path, "a.jsonl", json_lines([*good, *bad, {}, *good]))
    report = CorpusReport()
    assert list(stream_examples(path, report=report)) == [Example("a", text, 1), Example("a", text, 7)]
    assert [bad_line.line for bad_line in report.bad_lines] == [2, 3, 4, 5, 6]
    assert report.texts == 2


@pytest.mark.parametrize("labels", [("x", 1), (1, "x"), (1, True)])
def test_labels_of_several_types(tmp_path, labels):
    path = write(tmp_path, "a.jsonl", json_lines({"text": "a", "label": label} for label in labels))
    with pytest.raises(CorpusError, match=r"a.jsonl:2: label .* of line 1 is of type"):
        read(path)


def test_names_that_tell_no_format(tmp_path):
    path = write(tmp_path, "a.txt", json_lines([{"text": "a", "label": "x"}]))
    with pytest.raises(CorpusError, match="must be given"):
        read(path)
    assert read(path, file_format="jsonl") == [Example("a", "x", 1)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.lists(st.tuples(TEXT, TEXT), max_size=5))
def test_what_pythons_csv_writes_comes_back(tmp_path, rows):
    written = io.StringIO()
    csv.writer(written).writerows([("text", "label"), *rows])
    found = read(write(tmp_path, "a.csv", written.getvalue()))
    assert [(example.text, example.label) for example in found] == rows


def test_rows_that_go_over_several_lines_have_the_number_of_the_first(tmp_path):
    path = write(tmp_path, "a.csv", '\ufefftext,label\r\n"one\ntwo, ""quoted""",x\r\n\r\nthree,y\r\n')
    assert read(path) == [Example('one\ntwo, "quoted"', "x", 2), Example("three", "y", 5)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"a" b,x\n', r":2: .*quotation mark"),
        ('text,label\na,x\n"b,y\nc,z\n', r":3: .*line 4.*quotation mark"),
        ("text,label\na,x\nb, c,y\n", ":3: 3 values for the 2 columns text, label"),
        ("text,label\na\n", ":2: 1 values"),
        ("text,text\n", "names that differ"),
        ("", "is empty"),
    ],
)
def test_tables_that_cannot_be_trusted(tmp_path, content, message):
    with pytest.raises(CorpusError, match=message):
        read(write(tmp_path, "a.csv", content))


def test_a_column_that_is_missing_or_blank_leaves_the_row_out(tmp_path):
    report = CorpusReport()
    assert read(write(tmp_path, "a.csv", "text,class\na,x\n"), report=report) == []
    assert "'label'" in str(report.bad_lines[0])
    assert read(tmp_path / "a.csv", label_field="class") == [Example("a", "x", 2)]


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t")])
def test_values_of_tables_may_be_as_long_as_lines_of_json(tmp_path, name, separator):
    text = "word " * 40_000 + "end"
    path = write(tmp_path, name, f"text{separator}label\n{text}{separator}x\n")
    assert read(path) == [Example(text, "x", 2)]


def test_a_value_that_is_too_long_is_told_from_one_that_is_quoted_wrongly(tmp_path, monkeypatch):
    monkeypatch.setattr("hmi_engine.knowledge.corpus_tables.MAX_LINE_BYTES", 1000)
    before = csv.field_size_limit(1000)
    try:
        path = write(tmp_path, "a.csv", 'text,label\na,x\n"' + "b\n" * 600 + '",y\n')
        with pytest.raises(CorpusError, match=r":3: a value of more than 1000 characters .*split the text"):
            read(path)
    finally:
        csv.field_size_limit(before)


def test_quotation_marks_are_characters_in_tab_separated_values(tmp_path):
    path = write(tmp_path, "a.tsv", 'text\tlabel\n5" disk, "new\tx\n')
    assert read(path) == [Example('5" disk, "new', "x", 2)]


def test_multi_label(tmp_path):
    rows = [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": []}, {"text": "c", "label": "x"}]
    expected = [MultiLabelExample("a", ("x", "y"), 1), MultiLabelExample("b", (), 2)]
    assert read(write(tmp_path, "a.jsonl", json_lines(rows)), "multi_label") == expected
    table = write(tmp_path, "a.csv", "text,label\na,x; y\nb,\n")
    assert [example[:2] for example in read(table, "multi_label")] == [row[:2] for row in expected]


def test_regression(tmp_path):
    rows = [{"text": "a", "label": label} for label in (1, 0.5, "2", True, float("nan"), 10**400)]
    found = read(write(tmp_path, "a.jsonl", json_lines(rows)), "regression")
    assert found == [RegressionExample("a", 1.0, 1), RegressionExample("a", 0.5, 2)]
    table = write(tmp_path, "a.csv", "text,label\na,1.5\nb,many\nc,inf\n")
    assert read(table, "regression") == [RegressionExample("a", 1.5, 2)]


def test_pairs(tmp_path):
    rows = [
        {"anchor": "a", "positive": "b"},
        {"anchor": "a", "positive": "b", "negative": "c"},
        {"first": "a", "second": "b", "score": 3},
        {"first": "a", "second": "b", "score": -(10**400)},
        {"anchor": "a"},
    ]
    assert read(write(tmp_path, "a.jsonl", json_lines(rows)), "embedding") == [
        PairExample("a", "b", None, 1),
        PairExample("a", "b", "c", 2),
        ScoredPairExample("a", "b", 3.0, 3),
    ]
    table = write(tmp_path, "a.csv", "first,second,score\na,b,0.5\n")
    assert read(table, "embedding") == [ScoredPairExample("a", "b", 0.5, 2)]


def test_columns_of_words_and_tags(tmp_path):
    content = "-DOCSTART- O\n\nThe\tDT\tO\ncell\tNN\tB-x\n\n\nhot\u00a0dog  NN   B-y\n"
    expected = [
        TaggedExample(("The", "cell"), ("O", "B-x"), 3),
        TaggedExample(("hot\u00a0dog",), ("B-y",), 7),
    ]
    assert read(write(tmp_path, "a.conll", content), "token_classification") == expected
    with pytest.raises(CorpusError, match=":2: expected a word and its tag, found 'cell'"):
        read(write(tmp_path, "b.conll", "The O\ncell\n"), "token_classification")
    with pytest.raises(CorpusError, match="for token_classification"):
        read(tmp_path / "a.conll")


def test_lists_of_words_and_tags(tmp_path):
    rows = [
        {"words": ["New York", "is"], "tags": ["B-x", "O"]},
        {"words": ["a"], "tags": ["O", "O"]},
        {"words": "a b", "tags": ["O", "O"]},
    ]
    report = CorpusReport()
    found = read(write(tmp_path, "a.jsonl", json_lines(rows)), "token_classification", report=report)
    assert found == [TaggedExample(("New York", "is"), ("B-x", "O"), 1)]
    assert [bad.line for bad in report.bad_lines] == [2, 3]
