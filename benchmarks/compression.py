"""How small may rows be: what each format loses, how fast it merges, and what tasks make of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from pydantic import JsonValue
from torch import Tensor

from benchmarks.arguments import Arguments, read_arguments
from benchmarks.composition_texts import Sizes, TextSet, documentation_sets, folder_sets, prepare
from benchmarks.compression_rows import (
    StoredTable,
    Table,
    compute_table,
    nearest_distances,
    relative_error,
    store_table,
)
from benchmarks.compression_tasks import BASELINE, IN_SMALL_TABLE, TRAINED, Figures, Subject, task_accuracies
from benchmarks.result import BenchmarkResult, Case, Curve, Quantity, Ratio, System
from hmi_engine.construct.row_encoding import RowEncoder
from hmi_engine.construct.training import TrainingSettings
from hmi_engine.demo.base_model import PACKAGE, packaged_model
from hmi_engine.demo.timing import interleave
from hmi_engine.knowledge.row_formats import ROW_FORMATS, RowFormat, stored_row_bytes
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.bert_loading import import_bert
from hmi_engine.models.packing import PackedSequences
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["main", "measure"]

QUESTION = "How small may a table's rows be before the answers suffer?"
NOTES = (
    "One table for all sets: every bigram that their corpora (whole training splits) hold twice; window 2, "
    "K = N/2, undistilled. Codebooks are trained on the table's own rows, as in a store.",
    "Row error: length of what is lost over the length of the rows. State error: the same of the first upper "
    "layer's input, against float32 rows, on held-out texts; where the table misses nothing is lost.",
    "Accuracy on held-out texts: bottleneck adapters and a head on the upper layers by the engine's own "
    "training loop, the same recipe, seeds and texts for every format. Training texts are looked up without "
    "their own fold of the corpus. The +- is the standard error of the difference from float16 over sets and "
    "seeds.",
    "Curve: each format keeps the most frequent rows that its bytes (with codebooks, index and keys) hold; "
    "the error against all rows as float32 is that of the format and of what is missing together. Codebooks "
    "are those of the whole table.",
    "In a small table: the same, trained and served with the most frequent rows that 4 MiB hold; the "
    "difference is that from float16 in 4 MiB.",
    "Merge: rows to hidden states by the serving kernel, batches of 256 texts; formats interleaved.",
    "Near-duplicates: share of rows that have another row within that distance, in units of their own "
    "length. Storing such pairs once would save at most that share of the rows, and lose that much of them.",
)
MIB = 1 << 20
TEXTS_PER_BATCH = 256
DISTANCES = (0.01, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class _Plan:
    """Sizes of a run."""

    sizes: Sizes
    seeds: int
    epochs: int
    repetitions: int
    sampled_rows: int
    budgets: tuple[int, ...]
    small_budget: int


FULL = _Plan(
    Sizes(800, 1200, 48),
    seeds=2,
    epochs=3,
    repetitions=25,
    sampled_rows=2000,
    budgets=tuple(2**power for power in range(19, 27)),
    small_budget=4 * MIB,
)
QUICK = _Plan(
    Sizes(150, 50, 24),
    seeds=1,
    epochs=1,
    repetitions=3,
    sampled_rows=50,
    budgets=(2**16, 2**24),
    small_budget=2**16,
)


def _read(arguments: Arguments, sizes: Sizes) -> list[TextSet]:
    if arguments.data is not None:
        sets = folder_sets(arguments.data, sizes)
    else:
        sets = documentation_sets(sizes, num_topics=1 if arguments.quick else 3)
    return sets[:1] if arguments.quick else sets


def _load(arguments: Arguments, plan: _Plan, folder: Path) -> Subject:
    configuration, placeholder = import_bert(str(packaged_model()), folder)
    encoder = TextEncoder(folder, configuration.max_positions)
    sets = _read(arguments, plan.sizes)
    corpus = PackedSequences.pack(encoder.token_ids([text for each in sets for text in each.corpus]))
    model = HierarchicalBert.load(folder, configuration.num_layers // 2)
    table = compute_table(model, corpus, placeholder)
    stored = {row_format: store_table(table, row_format) for row_format in ROW_FORMATS}
    return Subject(table, stored, [prepare(each, encoder, plan.sizes) for each in sets])


def _held_out_states(subject: Subject, row_format: RowFormat, references: Sequence[Tensor]) -> Tensor:
    """The first upper layer's inputs for the held-out tokens of all sets, float32 [T, H]."""
    stored = subject.stored[row_format]
    return torch.cat(
        [
            stored.merge(texts.sequences, rows)[~texts.tokens_in_training]
            for texts, rows in zip(subject.sets, references, strict=True)
        ]
    )


def _errors(subject: Subject) -> Iterable[Quantity]:
    """Bytes, row error and state error of each format; the error with unigram rows subtracted first."""
    window, hidden_size = subject.table.rows.shape[1:]
    exact = _held_out_states(subject, "float32", subject.references)
    for row_format, stored in subject.stored.items():
        row_bytes = stored_row_bytes(row_format, window, hidden_size)
        yield Quantity(name=f"{row_format}: bytes a row", value=row_bytes, unit="bytes")
        yield Quantity(name=f"{row_format}: bytes of the table", value=stored.num_bytes, unit="bytes")
        yield Quantity(name=f"{row_format}: row error", value=stored.row_error(), unit="share")
        error = relative_error(_held_out_states(subject, row_format, subject.references), exact)
        yield Quantity(name=f"{row_format}: state error", value=error, unit="share")
    for row_format in TRAINED[1:]:
        error = _residual_error(subject.table, row_format)
        name = f"{row_format}: row error, unigram rows subtracted before encoding"
        yield Quantity(name=name, value=error, unit="share")


def _budget_curves(subject: Subject, budgets: Sequence[int]) -> list[Curve]:
    """State error on held-out texts of tables that were given so many bytes, against all rows as float32."""
    exact = _held_out_states(subject, "float32", subject.references)
    curves = []
    for row_format in TRAINED:
        errors = []
        for budget in budgets:
            references = subject.affordable_references(row_format, budget)
            errors.append(relative_error(_held_out_states(subject, row_format, references), exact))
        curves.append(
            Curve(
                figure="budget",
                name=row_format,
                x_label="bytes of the table",
                y_label="state error on held-out texts",
                x=tuple(map(float, budgets)),
                y=tuple(errors),
            )
        )
    return curves


def _residual_error(table: Table, row_format: RowFormat) -> float:
    unigrams = table.unigram_rows()
    residuals = table.rows - unigrams
    encoder = RowEncoder.fit(residuals, row_format)
    return relative_error(encoder.decode(encoder.encode(residuals)) + unigrams, table.rows)


def _near_duplicates(table: Table, count: int) -> Iterable[Quantity]:
    generator = torch.Generator().manual_seed(0)
    distances = nearest_distances(
        table.rows, torch.randperm(len(table.rows), generator=generator)[:count].tolist()
    )
    for bound in DISTANCES:
        share = float((distances <= bound).double().mean())
        yield Quantity(name=f"rows with another within {bound:.0%}", value=share, unit="share")


def _merge_case(subject: Subject, repetitions: int) -> Case:
    """All sets' texts through the merge, batch after batch."""
    batches = [
        batch
        for texts, references in zip(subject.sets, subject.references, strict=True)
        for batch in _batches(texts.sequences, references)
    ]

    def run(stored: StoredTable) -> Callable[[int], None]:
        def call(_: int) -> None:
            for sequences, references in batches:
                stored.merge(sequences, references)

        return call

    seconds = interleave(
        {name: run(stored) for name, stored in subject.stored.items()}, repetitions, warm_up=2
    )
    tokens = sum(sequences.num_tokens for sequences, _ in batches)
    systems = {
        name: System.of(
            name, f"{stored.num_bytes} bytes of rows", seconds[name], [tokens] * repetitions, "tokens"
        )
        for name, stored in subject.stored.items()
    }
    return Case(
        name="merge by row format",
        settings={"tokens": tokens, "rows": len(subject.table.rows), "texts_per_call": TEXTS_PER_BATCH},
        systems=tuple(systems.values()),
        ratios=tuple(Ratio.of(systems[name], systems[BASELINE]) for name in systems if name != BASELINE),
    )


def _batches(sequences: PackedSequences, references: Tensor) -> Iterable[tuple[PackedSequences, Tensor]]:
    token_ids = [ids.tolist() for ids in sequences.input_ids.split(sequences.lengths)]
    for first in range(0, len(token_ids), TEXTS_PER_BATCH):
        batch = PackedSequences.pack(token_ids[first : first + TEXTS_PER_BATCH])
        start = int(sequences.offsets[first])
        yield batch, references[start : start + batch.num_tokens].contiguous()


def _accuracy_quantities(found: Mapping[str, Figures]) -> Iterable[Quantity]:
    for set_name, figures in found.items():
        for name, values in figures.items():
            yield Quantity(name=f"{set_name}: accuracy, {name}", value=mean(values), unit="share")
    every = {name: [value for figures in found.values() for value in figures[name]] for name in _names(found)}
    for name, values in every.items():
        yield Quantity(name=f"all sets: accuracy, {name}", value=mean(values), unit="share")
        baseline = f"{BASELINE}{IN_SMALL_TABLE}" if name.endswith(IN_SMALL_TABLE) else BASELINE
        if name == baseline:
            continue
        differences = [value - other for value, other in zip(values, every[baseline], strict=True)]
        yield Quantity(name=f"all sets: {name}, minus {BASELINE}", value=mean(differences), unit="share")
        if len(differences) > 1:
            error = stdev(differences) / len(differences) ** 0.5
            yield Quantity(name=f"all sets: {name}, minus {BASELINE}, +-", value=error, unit="share")


def _names(found: Mapping[str, Figures]) -> list[str]:
    return list(next(iter(found.values())))


def measure(arguments: Arguments) -> BenchmarkResult:
    """Encodes one table in every format and measures them all."""
    plan = QUICK if arguments.quick else FULL
    settings = TrainingSettings(
        max_epochs=plan.epochs, patience=2, batch_size=32, max_tokens=plan.sizes.max_tokens
    )
    recipe: dict[str, JsonValue] = settings.model_dump(mode="json", exclude_none=True, exclude={"seed"})
    with tempfile.TemporaryDirectory() as folder:
        subject = _load(arguments, plan, Path(folder) / "general")
        with torch.inference_mode():
            case = _merge_case(subject, plan.repetitions)
            curves = _budget_curves(subject, plan.budgets)
            quantities = [*_errors(subject), *_near_duplicates(subject.table, plan.sampled_rows)]
        quantities += _accuracy_quantities(task_accuracies(subject, settings, plan.seeds, plan.small_budget))
    return BenchmarkResult.of(
        arguments,
        "compression",
        QUESTION,
        settings={
            "model": PACKAGE,
            "sets": [texts.name for texts in subject.sets],
            "training_texts": [len(texts.train) for texts in subject.sets],
            "held_out_texts": [len(texts.test) for texts in subject.sets],
            "rows": len(subject.table.rows),
            "seeds": plan.seeds,
            **recipe,
        },
        notes=NOTES,
        cases=(case,),
        quantities=quantities,
        curves=curves,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("compression", QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    for quantity in result.quantities:
        print(f"{quantity.name}: {quantity.value:.4g} {quantity.unit}")
    for ratio in result.cases[0].ratios:
        print(f"merge: {ratio.faster} is {ratio.times.value:.2f} x {ratio.baseline}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
