"""Compressed files, Parquet, standard input and broken UTF-8, against what was written."""

import gzip
import io
import json
import sys
from pathlib import Path

import duckdb
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmi_engine.errors import CorpusError
from hmi_engine.knowledge.corpus import (
    CorpusReport,
    corpus_bytes,
    corpus_files,
    stream_texts,
)
from hmi_engine.knowledge.corpus_examples import stream_examples
from hmi_engine.knowledge.examples import Example

LINES = [f"text number {number} of many" for number in range(5000)]
CONTENT = "\n".join(LINES).encode()
ANY_TEXT = st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=8)


def write_parquet(path: Path, values: list[object], *, column: str = "text", kind: str = "VARCHAR") -> Path:
    with duckdb.connect() as connection:
        quoted = column.replace('"', '""')
        connection.execute(f'CREATE TABLE rows ("{quoted}" {kind}, other INTEGER)')
        if values:
            connection.executemany("INSERT INTO rows VALUES (?, 1)", [[value] for value in values])
        plain = path.parent / "plain"
        connection.execute(f"COPY rows TO '{plain}' (FORMAT parquet)")
    return plain.rename(path)


def test_zstandard_files_are_read_frame_after_frame(tmp_path: Path) -> None:
    compress = zstandard.ZstdCompressor().compress
    middle = CONTENT.index(b"2500 of")
    path = tmp_path / "a.txt.zst"
    path.write_bytes(compress(CONTENT[:middle]) + compress(b"") + compress(CONTENT[middle:]))
    report = CorpusReport()
    assert list(stream_texts(path, report=report)) == LINES
    assert report.bytes == path.stat().st_size == corpus_bytes(path)


def test_examples_are_read_from_zstandard_files(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "a", "label": "x"}'))
    assert list(stream_examples(path)) == [Example("a", "x", 1)]


def wide_window(content: bytes) -> bytes:
    """A file whose decompression takes a window of 1 GiB."""
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=30)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


WHOLE = zstandard.ZstdCompressor(write_checksum=True).compress(CONTENT)  # as the zstd tool writes
DAMAGED = {
    "cut off": WHOLE[:-5],
    "overwritten": WHOLE[:100] + b"\xff" * 100 + WHOLE[200:],
    "no frame": b"no frame at all",
    "junk at the end": WHOLE + b"junk",
    "asks for too much memory": wide_window(CONTENT),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_zstandard_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=r"a\.txt\.zst: cannot be read"):
        list(stream_texts(path))


def test_a_cut_off_file_names_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(WHOLE[:-5])
    with pytest.raises(CorpusError, match="was cut off"):
        list(stream_texts(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(values=st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"])), max_size=8))
def test_parquet_rows_come_back_in_order(tmp_path: Path, values: list[object]) -> None:
    path = write_parquet(tmp_path / "a.parquet", values)
    report = CorpusReport()
    kept = [value.strip() for value in values if isinstance(value, str) and value.strip()]
    assert list(stream_texts(path, report=report)) == kept
    without = [row for row, value in enumerate(values, start=1) if value is None or not str(value).strip()]
    assert [bad.line for bad in report.bad_lines] == without
    assert report.bytes == path.stat().st_size == corpus_bytes(path)


def test_parquet_is_streamed_in_batches(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", list(LINES))
    report = CorpusReport()
    texts = stream_texts(path, report=report)
    assert [next(texts) for _ in range(1500)] == LINES[:1500]
    assert 0 < report.bytes < path.stat().st_size
    assert [*LINES[:1500], *texts] == LINES


def test_a_parquet_file_is_named_literally(tmp_path: Path) -> None:
    for name in ("a*.parquet", "ab.parquet", "[a]?.parquet"):
        write_parquet(tmp_path / name, [name], column='a "field"')
    for name in ("a*.parquet", "[a]?.parquet"):
        assert list(stream_texts(tmp_path / name, text_field='a "field"')) == [name]


def test_folders_above_a_parquet_file_are_no_columns(tmp_path: Path) -> None:
    folder = tmp_path / "text=train"
    folder.mkdir()
    path = write_parquet(folder / "a.parquet", ["one", "two"])
    assert list(stream_texts(path)) == ["one", "two"]
    path = write_parquet(folder / "b.parquet", ["one"], column="body")
    with pytest.raises(CorpusError, match="no column 'text'"):
        list(stream_texts(path))


def test_bytes_in_parquet_are_decoded_and_repairs_counted(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [b"fine", b"bro\xffken", "é".encode()], kind="BLOB")
    report = CorpusReport()
    assert list(stream_texts(path, report=report)) == ["fine", "bro\ufffdken", "é"]
    assert report.num_replaced == 1


def test_parquet_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["text"], column="Text")
    with pytest.raises(CorpusError, match=r"no column 'text'; the columns are \['Text', 'other'\]"):
        list(stream_texts(path))
    with pytest.raises(CorpusError, match="column 'other' holds INTEGER, not text"):
        list(stream_texts(path, text_field="other"))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CorpusError, match=r"a\.parquet: cannot be read"):
        list(stream_texts(path))
    # DuckDB writes no such file, but others do: a string column whose bytes are no UTF-8.
    broken = write_parquet(tmp_path / "b.parquet", ["QQQQ"])
    broken.write_bytes(broken.read_bytes().replace(b"QQQQ", b"Q\xffQQ"))
    with pytest.raises(CorpusError, match="not valid UTF8"):
        list(stream_texts(broken))


def test_a_folder_holds_files_of_all_formats(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two"))
    (tmp_path / "c.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(b"three"))
    (tmp_path / "d.jsonl").write_text('{"text": "four"}')
    (tmp_path / "e.jsonl.gz").write_bytes(gzip.compress(b'{"text": "five"}'))
    (tmp_path / "f.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(b'{"text": "six"}'))
    write_parquet(tmp_path / "g.parquet", ["seven"])
    (tmp_path / "h.pdf").write_text("no text")
    assert [path.name[0] for path in corpus_files(tmp_path)] == list("abcdefg")
    assert list(stream_texts(tmp_path)) == ["one", "two", "three", "four", "five", "six", "seven"]


@pytest.mark.parametrize("corpus", ["-", Path("-"), [Path("-")]])
def test_standard_input_is_a_corpus(monkeypatch: pytest.MonkeyPatch, corpus: object) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'one\n{"text": "two"}\n\n')))
    report = CorpusReport()
    assert corpus_bytes(corpus) is None  # type: ignore[arg-type]
    texts = list(stream_texts(corpus, report=report))  # type: ignore[arg-type]
    assert texts == ["one", '{"text": "two"}']
    assert report.bytes == 21


def test_standard_input_of_json_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"body": "one"}\nno object\n')))
    report = CorpusReport()
    assert list(stream_texts("-", text_field="body", stdin_format="jsonl", report=report)) == ["one"]
    assert [str(bad) for bad in report.bad_lines] == [
        "-:2: no JSON: Expecting value: line 1 column 1 (char 0)"
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=st.lists(st.binary(max_size=6).map(lambda line: line.replace(b"\n", b"")), max_size=6))
def test_lines_with_broken_utf8_are_repaired_and_counted(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n".join(lines))
    report = CorpusReport()
    repaired = [line.decode("utf-8", "replace").lstrip("\ufeff").strip() for line in lines]
    assert list(stream_texts(path, report=report)) == [text for text in repaired if text]
    assert report.num_replaced == sum(line != line.decode("utf-8", "ignore").encode() for line in lines)


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["a \ud83d b", "\ud83d\ude00", "c"]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    report = CorpusReport()
    assert list(stream_texts(path, report=report)) == ["a \ufffd b", "\U0001f600", "c"]
    assert report.num_replaced == 1
