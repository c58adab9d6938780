import gzip
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmi_engine.errors import CorpusError
from hmi_engine.knowledge import corpus_lines
from hmi_engine.knowledge.corpus import (
    BadLine,
    CorpusReport,
    check_not_empty,
    corpus_bytes,
    stream_texts,
)
from hmi_engine.knowledge.corpus_report import MAX_BAD_LINES

LINES = b"  first line \r\n\n\t\nsecond \xff line\nlast without end"
TEXTS = ["first line", "second \ufffd line", "last without end"]


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "A.TXT"])
def test_each_line_of_a_text_file_is_a_text(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, LINES)
    report = CorpusReport()
    assert list(stream_texts(path, report=report)) == TEXTS
    assert list(stream_texts(str(path))) == TEXTS
    assert (report.texts, report.characters, report.num_bad_lines) == (3, sum(map(len, TEXTS)), 0)
    assert report.bytes == path.stat().st_size == corpus_bytes(path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    assert list(stream_texts(write(tmp_path / "a.txt", "\ufeffé".encode()))) == ["é"]


BAD = [
    (2, b"{broken", "no JSON"),
    (4, b'{"body": "x"}', "no string in field 'text'; the fields are"),
    (5, b'{"text": 3}', "no string in field 'text'"),
    (6, b'["text"]', "a JSON list"),
    (7, b'{"text": "  "}', "blank"),
    (8, b"[" * 50_000, "no JSON"),
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_bad_lines_are_told_and_the_others_go_on(tmp_path: Path, name: str) -> None:
    lines = {number: line for number, line, _ in BAD} | {1: b'{"text": "one"}', 3: b"", 9: b'{"text": "two"}'}
    path = write(tmp_path / name, b"\n".join(lines[number] for number in sorted(lines)))
    seen: list[BadLine] = []
    report = CorpusReport()
    assert list(stream_texts(path, on_bad_line=seen.append, report=report)) == ["one", "two"]
    assert [(bad.path, bad.line) for bad in seen] == [(path, number) for number, _, _ in BAD]
    assert all(expected in bad.reason for bad, (_, _, expected) in zip(seen, BAD, strict=True))
    assert report.bad_lines == seen
    assert str(seen[0]).startswith(f"{path}:2: no JSON")


def test_another_field_can_be_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'{"body": "x", "text": "y"}')
    assert list(stream_texts(path, text_field="body")) == ["x"]


def test_only_the_first_bad_lines_are_kept(tmp_path: Path) -> None:
    report = CorpusReport()
    list(stream_texts(write(tmp_path / "a.jsonl", b"x\n" * 300), report=report))
    assert (len(report.bad_lines), report.num_bad_lines) == (MAX_BAD_LINES, 300)
    with pytest.raises(CorpusError, match=r"no text; 300 lines were left out, first .*a\.jsonl:1: no JSON"):
        check_not_empty(report)


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    write(tmp_path / "b" / "two.txt", b"two")
    write(tmp_path / "a" / "one.jsonl", b'{"text": "one"}')
    write(tmp_path / "three.txt.gz", b"three")
    write(tmp_path / "README.md", b"not text")
    write(tmp_path / ".hidden" / "x.txt", b"hidden")
    assert list(stream_texts(tmp_path)) == ["one", "two", "three"]
    assert corpus_bytes([tmp_path / "a", tmp_path / "b"]) == 3 + len(b'{"text": "one"}')


def test_paths_and_texts_are_told_apart(tmp_path: Path) -> None:
    one, two = write(tmp_path / "1.txt", b"one"), write(tmp_path / "2.txt", b"two")
    assert list(stream_texts([two, one])) == ["two", "one"]
    assert list(stream_texts(path for path in (one, two))) == ["one", "two"]
    assert list(stream_texts([str(one), "a text"])) == [str(one), "a text"]
    assert corpus_bytes(["a text"]) is None
    assert corpus_bytes(text for text in ["a text"]) is None
    report = CorpusReport()
    assert list(stream_texts(["é", "\ud800"], report=report)) == ["é", "\ufffd"]
    assert report.num_replaced == 1
    assert (report.texts, report.bytes) == (2, 2 + 3)
    with pytest.raises(CorpusError, match="not bytes"):
        list(stream_texts([b"text"]))  # type: ignore[list-item]


def test_texts_are_streamed_not_collected() -> None:
    def endless() -> Iterator[str]:
        while True:
            yield "text"

    texts = stream_texts(endless())
    assert [next(texts) for _ in range(3)] == ["text"] * 3


@pytest.mark.parametrize("name", ["gone.txt", "paper.pdf", "noname"])
def test_missing_and_unsupported_files_are_refused(tmp_path: Path, name: str) -> None:
    if name != "gone.txt":
        write(tmp_path / name, b"x")
    with pytest.raises(
        CorpusError, match="does not exist" if name == "gone.txt" else r"must end in \.txt, \.jsonl"
    ):
        list(stream_texts(tmp_path / name))
    with pytest.raises(CorpusError):
        corpus_bytes([tmp_path / name])


def test_a_folder_without_text_and_a_broken_archive_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="holds no"):
        list(stream_texts(tmp_path / "empty"))
    whole = gzip.compress(b"text\n" * 10_000)
    for number, content in enumerate((whole[:-20], b"no gzip", whole[:60] + b"\0\0\0\0" + whole[64:])):
        path = tmp_path / f"{number}.txt.gz"
        path.write_bytes(content)
        with pytest.raises(CorpusError, match="cannot be read"):
            list(stream_texts(path))


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_lines, "MAX_LINE_BYTES", 10)
    report = CorpusReport()
    path = write(tmp_path / "a.txt", b"one\n" + b"x" * 35 + b"\n" + b"123456789\n" + b"y" * 11)
    assert list(stream_texts(path, report=report)) == ["one", "123456789"]
    assert [bad.line for bad in report.bad_lines] == [2, 4]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]))), st.booleans())
def test_json_lines_come_back_as_they_were(tmp_path: Path, texts: list[str], escaped: bool) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=escaped) for text in texts]
    path = write(tmp_path / "a.jsonl.gz", "\n".join(lines).encode())
    assert list(stream_texts(path)) == [text for text in texts if text.strip()]
