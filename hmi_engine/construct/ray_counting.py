"""N-grams counted on a Ray cluster: each part of a corpus by itself, and the counts added up.

Addition is associative and commutative (:func:`~hmi_engine.construct.counting.merge_counts`), so neither how
the corpus is divided nor which part is done first changes the result: it is that of one machine.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hmi_engine.construct.counting import CorpusCounts, Progress, count_corpus, cut_counts, merge_counts
from hmi_engine.construct.domain_corpus import CorpusSource
from hmi_engine.errors import CorpusError, StoreFullError
from hmi_engine.knowledge.corpus import (
    BadLine,
    CorpusReport,
    check_not_empty,
    corpus_bytes,
    corpus_files,
    stream_texts,
)
from hmi_engine.knowledge.corpus_files import STDIN
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["count_on_ray"]

TEXTS_PER_PART = 4096
_ARRAYS = ("keys", "counts", "documents")
_TOTALS = ("total_occurrences", "num_distinct", "num_texts", "num_tokens")


def count_on_ray(
    source: CorpusSource,
    encoder: TextEncoder,
    general: GeneralInfo,
    *,
    max_ngrams: int | None,
    progress: Progress | None,
) -> CorpusCounts:
    """Counts the n-grams of a source on the connected cluster, as ``count_source`` does on one machine.

    A file is a part, which a worker reads: all machines must see it under the same path. Texts that are no
    files are read here and travel through Ray's object store. The sum of all counts is made in this
    process' memory (16 bytes for each distinct window, and as much again in the making).

    Raises:
        CorpusError: a path cannot be read, or there is no text at all.
        StoreFullError: no room in a worker's scratch folder.
    """
    import ray.data

    parts = [{"number": number, **part} for number, part in enumerate(_parts(source))]
    total_bytes = corpus_bytes(source.corpus)
    reports: list[tuple[int, CorpusReport]] = []
    total = _Sum()
    if parts:
        count = partial(_count_part, source=_without_corpus(source), encoder=encoder, window=general.window)
        counted = ray.data.from_items(parts, override_num_blocks=len(parts)).map_batches(
            count, batch_size=1, batch_format="numpy"
        )
        for row in counted.iter_rows():
            reports.append((int(row["number"]), _report_of(row)))
            # A part without text is no error as long as another has some.
            if row["num_texts"]:
                total.add(_counts_of(row))
            if progress:
                done = sum(report.bytes for _, report in reports)
                progress("counting n-grams (bytes of files)", done, total_bytes)
    # Workers are done in any order; of texts that were read here, the report is there already.
    for _, report in sorted(reports, key=lambda numbered: numbered[0]):
        _add_report(source.report, report)
    check_not_empty(source.report)
    return cut_counts(total.take(), max_ngrams=max_ngrams)


def _without_corpus(source: CorpusSource) -> CorpusSource:
    """How to read and count, for workers: the corpus may be an iterator, which cannot travel."""
    return CorpusSource(
        (), text_field=source.text_field, count_memory=source.count_memory, scratch=source.scratch
    )


def _parts(source: CorpusSource) -> Iterator[dict[str, str]]:
    """Yields what a worker counts at a time: a file's path, or texts."""
    texts = []
    for item in _items(source):
        if isinstance(item, Path) and item != STDIN:
            yield from ({"file": str(file.absolute()), "texts": "[]"} for file in corpus_files(item))
        else:
            # A text, the standard input, or what stream_texts refuses.
            texts.append(_read_here(source, item))
            if len(texts) >= TEXTS_PER_PART:
                yield from _text_parts(itertools.chain.from_iterable(texts))
                texts = []
    yield from _text_parts(itertools.chain.from_iterable(texts))


def _items(source: CorpusSource) -> Iterable[Any]:
    if isinstance(source.corpus, str | Path):
        return [Path(source.corpus)]
    return source.corpus


def _read_here(source: CorpusSource, item: Any) -> Iterator[str]:
    return stream_texts(
        [item], text_field=source.text_field, stdin_format=source.stdin_format, report=source.report
    )


def _text_parts(texts: Iterator[str]) -> Iterator[dict[str, str]]:
    while part := list(itertools.islice(texts, TEXTS_PER_PART)):
        yield {"file": "", "texts": json.dumps(part)}


def _count_part(
    batch: dict[str, Any], *, source: CorpusSource, encoder: TextEncoder, window: int
) -> dict[str, Any]:
    """Runs on the cluster; counts one part, uncut. What went wrong is told, not raised: it has our types."""
    report = CorpusReport()
    file = str(batch["file"][0])
    fault = message = ""
    counts = _NOTHING
    try:
        texts = _texts_of_part(file, str(batch["texts"][0]), source, report)
        if (first := next(texts, None)) is not None:
            counts = count_corpus(
                itertools.chain([first], texts),
                encoder,
                window=window,
                memory_bytes=source.count_memory,
                scratch=source.scratch,
            )
    except (CorpusError, StoreFullError) as error:
        fault, message = type(error).__name__, str(error)
    told = {"number": batch["number"], "fault": [fault], "message": [message], "report": [_dump(report)]}
    totals = {name: [getattr(counts, name)] for name in _TOTALS}
    return told | totals | {name: [getattr(counts, name).numpy()] for name in _ARRAYS}


def _texts_of_part(file: str, texts: str, source: CorpusSource, report: CorpusReport) -> Iterator[str]:
    if file:
        return stream_texts(Path(file), text_field=source.text_field, report=report)
    return iter(json.loads(texts))  # whoever read them has told of them


def _dump(report: CorpusReport) -> str:
    described = asdict(report)
    described["bad_lines"] = [(str(bad.path), bad.line, bad.reason) for bad in report.bad_lines]
    return json.dumps(described)


def _report_of(row: Mapping[str, Any]) -> CorpusReport:
    if row["fault"]:
        raise (StoreFullError if row["fault"] == StoreFullError.__name__ else CorpusError)(row["message"])
    described = json.loads(row["report"])
    bad_lines = [BadLine(Path(path), line, reason) for path, line, reason in described.pop("bad_lines")]
    return CorpusReport(**described, bad_lines=bad_lines)


def _add_report(report: CorpusReport, part: CorpusReport) -> None:
    """Adds what a worker read."""
    for name in ("texts", "characters", "bytes", "num_replaced"):
        setattr(report, name, getattr(report, name) + getattr(part, name))
    for bad_line in part.bad_lines:
        report.add_bad_line(bad_line)
    report.num_bad_lines += part.num_bad_lines - len(part.bad_lines)


def _counts_of(row: Mapping[str, Any]) -> CorpusCounts:
    arrays = {name: torch.tensor(np.asarray(row[name], np.int64)) for name in _ARRAYS}
    totals = {name: int(row[name]) for name in _TOTALS}
    return CorpusCounts(keys=arrays["keys"], counts=arrays["counts"], documents=arrays["documents"], **totals)


class _Sum:
    """Adds up counts so that each is merged into ones of about its size: log(parts) times, not once each."""

    def __init__(self) -> None:
        self._sums: list[CorpusCounts] = []

    def add(self, counts: CorpusCounts) -> None:
        while self._sums and len(self._sums[-1].keys) <= len(counts.keys):
            counts = merge_counts(self._sums.pop(), counts)
        self._sums.append(counts)

    def take(self) -> CorpusCounts:
        total = _NOTHING
        while self._sums:
            total = merge_counts(self._sums.pop(), total)
        return total


_NONE = torch.empty(0, dtype=torch.int64)
_NOTHING = CorpusCounts(_NONE, _NONE, 0, 0, 0, 0, _NONE)
