"""What a domain's table is planned from: its text, read and counted, and the traffic since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import torch
from pydantic import JsonValue
from torch import Tensor

from hmi_engine.construct.build_folder import BuildFolder
from hmi_engine.construct.counting import CorpusCounts, Progress, count_corpus
from hmi_engine.construct.table_plan import TablePlan, TableSettings, largest_useful_count, plan_table
from hmi_engine.knowledge.corpus import Corpus, CorpusReport, corpus_bytes, corpus_files, stream_texts
from hmi_engine.knowledge.frequencies import Frequencies
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.plot_table import PlotTable
from hmi_engine.knowledge.traffic_file import TrafficCounts
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["CorpusSource", "DomainCorpus", "count_source", "plan_domain"]


@dataclass(frozen=True, eq=False)
class DomainCorpus:
    """What a domain's table is planned from: frequencies, and the corpora they come from."""

    frequencies: Frequencies
    corpus_tokens: int = 0
    documents: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @classmethod
    def of(cls, table: PlotTable) -> DomainCorpus:
        """What a table knows."""
        return cls(table.frequencies, table.metadata.corpus_tokens, table.documents)

    def with_corpus(self, counts: CorpusCounts) -> DomainCorpus:
        """This and more text."""
        return DomainCorpus(
            self.frequencies.with_corpus(counts.keys, counts.counts, occurrences=counts.total_occurrences),
            self.corpus_tokens + counts.num_tokens,
            torch.cat([self.documents, counts.documents]).unique(),
        )

    def with_traffic(self, traffic: Sequence[TrafficCounts], half_life_tokens: float) -> DomainCorpus:
        """This and what engines saw since, oldest first."""
        frequencies = self.frequencies
        for seen in traffic:
            frequencies = frequencies.with_traffic(
                seen.keys,
                seen.weights,
                tokens=seen.tokens,
                occurrences=seen.occurrences,
                half_life_tokens=half_life_tokens,
            )
        return replace(self, frequencies=frequencies)


class CorpusSource:
    """Text to count, and how.

    Attributes:
        report: what has been read of it so far.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        text_field: str = "text",
        stdin_format: Literal["txt", "jsonl"] = "txt",
        count_memory: int = 1 << 30,
        scratch: Path | None = None,
    ) -> None:
        """``count_memory`` bytes are for counts; beyond, they go to files in ``scratch``."""
        self.corpus = corpus
        self.text_field = text_field
        self.stdin_format: Literal["txt", "jsonl"] = stdin_format
        self.count_memory = count_memory
        self.scratch = scratch
        self.report = CorpusReport()

    def fingerprint(self) -> str | None:
        """A digest of names, sizes and times of the corpus' files; None where it is not files alone."""
        items = [self.corpus] if isinstance(self.corpus, str | Path) else self.corpus
        if not isinstance(items, list | tuple) or any(str(item) == "-" for item in items):
            return None
        if any(isinstance(item, str) and item is not self.corpus for item in items):
            return None
        files = [file for item in items for file in corpus_files(Path(item))]
        described = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(json.dumps([self.text_field, described]).encode()).hexdigest()


class CountSource(Protocol):
    """Counts the n-grams of a source, here (:func:`count_source`) or elsewhere."""

    def __call__(
        self,
        source: CorpusSource,
        encoder: TextEncoder,
        general: GeneralInfo,
        *,
        max_ngrams: int | None,
        progress: Progress | None,
    ) -> CorpusCounts:
        """Returns the counts; ``source.report`` then tells what was read."""


def count_source(
    source: CorpusSource,
    encoder: TextEncoder,
    general: GeneralInfo,
    *,
    max_ngrams: int | None,
    progress: Progress | None,
) -> CorpusCounts:
    """Counts the n-grams of a source; ``source.report`` then tells what was read.

    Raises:
        CorpusError: a path cannot be read, or there is no text at all.
        StoreFullError: no room in the scratch folder.
    """
    texts = stream_texts(
        source.corpus, text_field=source.text_field, stdin_format=source.stdin_format, report=source.report
    )
    return count_corpus(
        texts,
        encoder,
        window=general.window,
        is_causal=general.is_causal,
        memory_bytes=source.count_memory,
        max_ngrams=max_ngrams,
        scratch=source.scratch,
        progress=progress,
        report=source.report,
        total_bytes=corpus_bytes(source.corpus),
    )


def plan_domain(
    source: CorpusSource,
    encoder: TextEncoder,
    general: GeneralInfo,
    settings: TableSettings,
    folder: BuildFolder,
    *,
    layer_identity: str,
    above: Sequence[PlotTable],
    progress: Progress | None,
    count: CountSource = count_source,
) -> TablePlan:
    """Plans a new domain's table and keeps the plan in ``folder``.

    Where ``folder`` holds the plan of an interrupted build of the same files with the same settings, below
    tables of the same n-grams, that is the plan, nothing is read, and the rows that were computed are there.

    Raises:
        BudgetTooSmallError: the budget is not 0, and not enough for one row.
        CorpusError, StoreFullError: as :func:`count_source`.
    """
    inherited = [table.index for table in above]
    files = source.fingerprint()
    build = f"{files} {settings} {layer_identity} {[_keys_digest(table) for table in above]}"
    if files is not None and (saved := folder.load(build)) is not None:
        source.report.texts = int(str(saved.statistics.get("texts", 0)))
        return saved
    counts = count(
        source,
        encoder,
        general,
        max_ngrams=largest_useful_count(settings, general, inherited),
        progress=progress,
    )
    plan = plan_table(
        Frequencies.none().with_corpus(counts.keys, counts.counts, occurrences=counts.total_occurrences),
        settings,
        general,
        layer_identity=layer_identity,
        corpus_tokens=counts.num_tokens,
        documents=counts.documents,
        inherited=inherited,
    )
    texts: dict[str, JsonValue] = {"texts": counts.num_texts, "plot_bytes": settings.plot_bytes}
    plan.statistics.update(texts)
    fingerprint = build if files is not None else plan.fingerprint()
    if files is not None or folder.load(fingerprint) is None:
        folder.save(plan, fingerprint)
    return plan


def _keys_digest(table: PlotTable) -> str:
    """Of the n-grams with a row: all that a plan of a table below takes from it, and a hundredth of it."""
    return hashlib.sha256(table.row_keys.contiguous().numpy().data).hexdigest()
