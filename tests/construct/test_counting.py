"""Counts of corpora, in memory, on disk and in parts, against collections.Counter."""

from __future__ import annotations

import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import WORDS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

import hmi_kernels
from hmi_engine.construct import counting_batches, counting_spill, counting_windows
from hmi_engine.construct.counting import CorpusCounts, count_corpus, cut_counts, merge_counts
from hmi_engine.errors import CorpusError, StoreFullError
from hmi_engine.knowledge.corpus import CorpusReport, corpus_bytes, stream_texts
from hmi_engine.knowledge.plot_table import text_digest
from hmi_engine.models.tokenization import TextEncoder

Windows = Counter[tuple[int, int, int]]
TEXTS = st.lists(st.lists(st.sampled_from(WORDS[:6]), max_size=6).map(" ".join), min_size=1, max_size=8)
SLOW = settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def encoder(tiny_bert: Path) -> TextEncoder:
    return TextEncoder(tiny_bert, 48)


def count_windows(texts: Sequence[str], encoder: TextEncoder, window: int) -> Windows:
    """Every window by its slots, -1 where absent."""
    found: Windows = Counter()
    for ids in encoder.token_ids(list(texts), whole=True):
        found += windows_of(ids, window)
    return found


def windows_of(ids: list[int], window: int) -> Windows:
    pairs = list(pairwise(ids))
    found: Windows = Counter((a, b, -1) for a, b in pairs)
    if window == 3:
        found.update((-1, a, b) for a, b in pairs)
        found.update(zip(ids, ids[1:], ids[2:], strict=False))
    return found


def as_windows(counts: CorpusCounts) -> Windows:
    assert (counts.keys.diff() > 0).all()
    slots = [(a, b, c) for a, b, c in hmi_kernels.ngram_tokens(counts.keys).tolist()]
    return Counter(dict(zip(slots, counts.counts.tolist(), strict=True)))


def most_frequent(windows: Windows, min_count: int, max_ngrams: int | None) -> Windows:
    # A key orders windows as their slots do.
    ranked = sorted(windows.items(), key=lambda item: (-item[1], item[0]))
    return Counter(dict([item for item in ranked if item[1] >= min_count][:max_ngrams]))


def assert_equal(one: CorpusCounts, other: CorpusCounts) -> None:
    for name in ("keys", "counts", "documents"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    for name in ("total_occurrences", "num_distinct", "num_texts", "num_tokens"):
        assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("memory_bytes", [1 << 30, 1], ids=["memory", "disk"])
@SLOW
@given(texts=TEXTS, min_count=st.integers(1, 3), max_ngrams=st.none() | st.integers(0, 12))
def test_counts_equal_counter(
    encoder: TextEncoder,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    memory_bytes: int,
    texts: list[str],
    min_count: int,
    max_ngrams: int | None,
) -> None:
    monkeypatch.setattr(counting_batches, "TEXTS_PER_BATCH", 2)
    monkeypatch.setattr(counting_spill, "_ROWS_PER_FETCH", 5)
    counts = count_corpus(
        texts, encoder, window=window, min_count=min_count, max_ngrams=max_ngrams, memory_bytes=memory_bytes
    )
    expected = count_windows(texts, encoder, window)
    assert as_windows(counts) == most_frequent(expected, min_count, max_ngrams)
    assert (counts.total_occurrences, counts.num_distinct) == (expected.total(), len(expected))
    assert (counts.num_texts, counts.num_tokens) == (len(texts), sum(map(len, encoder.token_ids(texts))))
    assert counts.documents.tolist() == sorted({text_digest(text) for text in texts})


@pytest.mark.parametrize("splits_at_spaces", [True, False])
@pytest.mark.parametrize("window", [2, 3])
@SLOW
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=4),
    tokens_at_once=st.sampled_from([1, 2, 7, 64, 1 << 20]),
)
def test_all_of_a_long_text_is_counted_once(
    tiny_bert: Path,
    monkeypatch: pytest.MonkeyPatch,
    window: int,
    splits_at_spaces: bool,
    lengths: list[int],
    tokens_at_once: int,
) -> None:
    """Also what lies behind the model's 48 positions; [CLS] and [SEP] stand at the true ends alone."""
    encoder = TextEncoder(tiny_bert, 48)
    if not splits_at_spaces:
        encoder._tokenizer.normalizer = normalizers.Replace("  ", " ")
    monkeypatch.setattr(counting_windows, "TOKENS_AT_ONCE", tokens_at_once)
    names = ["[CLS]", "[SEP]", *dict.fromkeys(WORDS)]
    number = {name: encoder._tokenizer.token_to_id(name) for name in names}
    words = [[WORDS[(7 * place + length) % len(WORDS)] for place in range(length)] for length in lengths]
    expected: Windows = Counter()
    for text in words:
        ids = [number["[CLS]"], *(number[word] for word in text), number["[SEP]"]]
        expected += windows_of(ids, window)
    counts = count_corpus([" ".join(text) for text in words], encoder, window=window)
    assert as_windows(counts) == expected
    assert counts.total_occurrences == expected.total()
    assert counts.num_tokens == sum(lengths) + 2 * len(lengths)


@pytest.mark.parametrize("window", [2, 3])
def test_memory_and_disk_count_the_same(
    encoder: TextEncoder, corpus: list[str], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(counting_batches, "TEXTS_PER_BATCH", 16)
    in_memory = count_corpus(corpus, encoder, window=window)
    on_disk = count_corpus(corpus, encoder, window=window, memory_bytes=64 << 10)
    assert as_windows(in_memory) == count_windows(corpus, encoder, window)
    assert_equal(on_disk, in_memory)


@pytest.mark.parametrize("window", [2, 3])
@SLOW
@given(parts=st.lists(TEXTS, min_size=3, max_size=3), max_ngrams=st.none() | st.integers(0, 9))
def test_merging_is_associative_and_commutative(
    encoder: TextEncoder, window: int, parts: list[list[str]], max_ngrams: int | None
) -> None:
    a, b, c = (count_corpus(part, encoder, window=window) for part in parts)
    whole = count_corpus([text for part in parts for text in part], encoder, window=window)
    assert_equal(merge_counts(merge_counts(a, b), c), whole)
    assert_equal(merge_counts(a, merge_counts(b, c)), whole)
    assert_equal(merge_counts(c, merge_counts(b, a)), whole)
    limited = count_corpus(
        [text for part in parts for text in part], encoder, window=window, min_count=2, max_ngrams=max_ngrams
    )
    assert_equal(cut_counts(whole, min_count=2, max_ngrams=max_ngrams), limited)


def test_cut_counts_are_not_merged(encoder: TextEncoder) -> None:
    whole = count_corpus(["the cell", "the gene"], encoder, window=2)
    with pytest.raises(ValueError, match="only whole counts can be merged, but of 5 windows 2 are left"):
        merge_counts(whole, cut_counts(whole, max_ngrams=2))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"window": 4}, "window must be 2 or 3"),
        ({"window": 2, "min_count": 0}, "min_count must be at least 1"),
        ({"window": 2, "max_ngrams": -1}, "max_ngrams must not be negative"),
    ],
)
def test_limits_out_of_range_are_refused(encoder: TextEncoder, limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count_corpus(["the cell"], encoder, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize("memory_bytes", [1 << 30, 1])
def test_texts_without_a_window(encoder: TextEncoder, memory_bytes: int, tiny_bert: Path) -> None:
    with pytest.raises(CorpusError, match="holds no text"):
        count_corpus([], encoder, window=2, memory_bytes=memory_bytes)
    bare = TextEncoder(tiny_bert, 48)
    bare._tokenizer.post_processor = None  # no special tokens: texts may be empty or of one token
    counts = count_corpus(["", "the", ""], bare, window=3, memory_bytes=memory_bytes)
    assert (len(counts.keys), counts.num_texts, counts.num_tokens, counts.total_occurrences) == (0, 3, 1, 0)


def test_progress_tells_texts_or_bytes(encoder: TextEncoder, tmp_path: Path, corpus: list[str]) -> None:
    told: list[tuple[str, int, int | None]] = []

    def progress(*step: object) -> None:
        told.append(step)  # type: ignore[arg-type]

    count_corpus(corpus, encoder, window=2, progress=progress, memory_bytes=1)
    assert told == [("counting n-grams (texts)", len(corpus), None)]
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(corpus))
    report, total = CorpusReport(), corpus_bytes(path)
    texts = stream_texts(path, report=report)
    count_corpus(texts, encoder, window=2, progress=progress, report=report, total_bytes=total)
    assert told[-1] == ("counting n-grams (bytes)", total, total)


def interrupted(folder: Path, error: type[BaseException] | None) -> Iterator[str]:
    """Texts that reach the disk, and then what happens."""
    for number in range(60):
        yield WORDS[number % 40] + " " + WORDS[number % 37]
    assert list(folder.iterdir()), "nothing was spilled"
    if error:
        raise error("while reading")


@pytest.mark.parametrize("error", [CorpusError, KeyboardInterrupt])
def test_nothing_is_left_on_disk(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[BaseException]
) -> None:
    monkeypatch.setattr(counting_batches, "TEXTS_PER_BATCH", 10)
    count_corpus(interrupted(tmp_path, None), encoder, window=2, memory_bytes=1, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(error, match="while reading"):
        count_corpus(interrupted(tmp_path, error), encoder, window=2, memory_bytes=1, scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_scratch_folder_that_is_none_is_refused(
    encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(counting_batches, "TEXTS_PER_BATCH", 1)
    with pytest.raises(CorpusError, match=r"no counts can be kept in .*gone"):
        count_corpus(["the cell"] * 2, encoder, window=2, memory_bytes=1, scratch=tmp_path / "gone")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False, text=True)
    if mounted.returncode:
        pytest.skip(f"no right to mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named(small_disk: Path) -> None:
    keys = torch.randint(1, 2**62, (200_000,), generator=torch.Generator().manual_seed(0)).numpy()
    spilled = counting_spill.SpilledCounts(small_disk, 1)
    with pytest.raises(StoreFullError, match=f"no room for the counts in {small_disk}: "):
        for _ in range(20):
            spilled.append(keys, keys)
    spilled.close()
    assert list(small_disk.iterdir()) == []


def test_a_query_can_be_interrupted(tmp_path: Path) -> None:
    spilled = counting_spill.SpilledCounts(tmp_path, 1)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt), spilled._told():
            spilled._execute("SELECT sum(a.range * b.range) FROM range(10000000) a, range(10000000) b")
    finally:
        signal.signal(signal.SIGALRM, before)
        spilled.close()
    assert list(tmp_path.iterdir()) == []
