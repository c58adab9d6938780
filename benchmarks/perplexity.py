"""What does a language model lose by looking its lowest layers up?"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer
from transformers import GPT2Config

from benchmarks.arguments import RESULTS
from benchmarks.kept_steps import KeptSteps
from benchmarks.perplexity_models import HierarchicalModel, base_scores
from benchmarks.perplexity_scores import Scores, perplexity, perplexity_ratio
from benchmarks.recorded_command import recorded_command
from benchmarks.result import BenchmarkResult, Curve, Quantity, Table
from benchmarks.small_gpt2_text import END, read_documents
from hmi_engine.demo.environment import describe_machine, installed_versions
from hmi_engine.knowledge.sizes import parse_bytes
from hmi_engine.knowledge.tensor_file import file_sha256
from hmi_engine.models.general_folder import MERGE_FILE, WEIGHTS_FILE

__all__ = ["Study", "main", "measure"]

NAME = "perplexity"
QUESTION = "What does a language model lose by looking its lowest layers up?"
BASE, EXACT = "base model", "exact"
MIN_TOKENS = 8
NOTES = (
    "Perplexity of held-out documents, each read alone behind the end-of-text token and cut to the model's "
    "positions; over all their tokens. The 95 % interval is bootstrapped over documents; that of the ratio "
    "to the base model draws the same documents for both.",
    "The base model is computed by transformers. Its hierarchical forms are computed by HMI, from a store's "
    "tables: trigram windows, rows in float16.",
    "Exact: every window that is missing is computed. With a table: it was built from the training text in "
    "so many bytes, n-grams that are there twice; what it lacks falls back to the bigram, then the unigram.",
    "Distilled forms have learned from the same training text as the base model; no held-out document is of "
    "a source file with training text.",
)


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        model: folder of the base model.
        distilled: by K, the folder of a distilled form.
        text: folder of ``train.jsonl`` and ``held_out.jsonl``.
        plot_layers: every K.
        budgets: of tables.
        documents: at most so many held-out documents.
        train_documents: at most so many for a table; None for all.
    """

    model: Path
    distilled: Mapping[int, Path]
    text: Path
    plot_layers: tuple[int, ...]
    budgets: tuple[str, ...]
    documents: int
    train_documents: int | None

    def forms(self) -> Iterator[tuple[str, int, Path]]:
        """Each hierarchical form: name, K and folder."""
        for plot_layers in self.plot_layers:
            yield f"K = {plot_layers}, undistilled", plot_layers, self.model
            if plot_layers in self.distilled:
                yield f"K = {plot_layers}, distilled", plot_layers, self.distilled[plot_layers]

    def key(self) -> str:
        """Tells studies apart that must not share steps."""
        folders = [self.model, *self.distilled.values()]
        files = [folder / name for folder in folders for name in (WEIGHTS_FILE, MERGE_FILE)]
        files += [self.text / "train.jsonl", self.text / "held_out.jsonl"]
        digests = [file_sha256(path) for path in files if path.exists()]
        sizes = [self.plot_layers, list(self.distilled), self.documents, self.train_documents]
        return json.dumps([digests, sizes])


def _read_documents(study: Study) -> list[list[int]]:
    """Token ids of the held-out documents, evenly over the file, none of almost no tokens."""
    tokenizer = Tokenizer.from_file(str(study.model / "tokenizer.json"))
    positions = GPT2Config.from_pretrained(study.model).n_positions
    texts = [END + document.text for document in read_documents(study.text / "held_out.jsonl")]
    encoded = [encoding.ids[:positions] for encoding in tokenizer.encode_batch_fast(texts)]
    usable = [ids for ids in encoded if len(ids) >= MIN_TOKENS]
    return usable[:: max(1, -(-len(usable) // study.documents))]


def _read_corpus(study: Study) -> list[str]:
    documents = read_documents(study.text / "train.jsonl")[: study.train_documents]
    return [END + document.text for document in documents]


def _form_scores(
    study: Study, form: tuple[str, int, Path], documents: Sequence[list[int]], steps: KeptSteps
) -> dict[str, Scores]:
    """One form: exact, and by each table; the store is made if one of them is not kept."""
    name, plot_layers, folder = form
    found = {}
    with ExitStack() as stack:
        models: list[HierarchicalModel] = []

        def model() -> HierarchicalModel:
            if not models:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "store"
                models.append(stack.enter_context(HierarchicalModel(place, folder, plot_layers)))
            return models[0]

        def by_table(budget: str) -> Scores:
            store = model().store
            store.add_domain(budget, _read_corpus(study), plot_bytes=budget)
            scores = model().table_scores(documents, budget)
            store.remove_domain(budget)
            return scores

        exact = steps.take(f"{name}, {EXACT}", Scores, lambda: model().exact_scores(documents))
        for budget in study.budgets:
            found[budget] = steps.take(f"{name}, {budget}", Scores, lambda budget=budget: by_table(budget))
    return {EXACT: exact, **found}


def measure(study: Study, out: Path, command: str, *, is_quick: bool) -> BenchmarkResult:
    """Measures all forms on the same documents; goes on where a run that was cut short has stopped."""
    documents = _read_documents(study)
    steps = KeptSteps(out, study.key())
    base = steps.take(BASE, Scores, lambda: base_scores(study.model, documents))
    rows = [_row(BASE, base, base)]
    curves, quantities = [], [_quantity(BASE, base)]
    for form in study.forms():
        scores = _form_scores(study, form, documents, steps)
        rows += [_row(f"{form[0]}, {how}", each, base) for how, each in scores.items()]
        quantities += [_quantity(f"{form[0]}, {how}", each) for how, each in scores.items()]
        curves.append(_curve(form[0], study.budgets, scores, base))
    result = BenchmarkResult(
        name=NAME,
        question=QUESTION,
        command=command,
        is_quick=is_quick,
        machine=describe_machine(),
        versions=installed_versions(),
        settings={
            "model": str(study.model),
            "distilled": {str(layers): str(folder) for layers, folder in study.distilled.items()},
            "layers": GPT2Config.from_pretrained(study.model).n_layer,
            "held_out_documents": len(documents),
            "held_out_tokens": sum(base.tokens),
            "budgets": list(study.budgets),
        },
        notes=NOTES,
        cases=(),
        quantities=tuple(quantities),
        curves=tuple(curves),
        tables=(Table(title="Held-out perplexity", columns=_COLUMNS, rows=tuple(rows)),),
    )
    result.write(out)
    steps.forget()
    return result


_COLUMNS = (
    "model",
    "perplexity",
    "low",
    "high",
    "times the base's",
    "low of times",
    "high of times",
    "share of trigram rows",
    "share of bigram rows",
    "share of unigram rows",
)


def _row(name: str, scores: Scores, base: Scores) -> tuple[str | float | None, ...]:
    own, ratio = perplexity(scores), perplexity_ratio(scores, base)
    intervals = (own.value, own.low, own.high, ratio.value, ratio.low, ratio.high)
    is_table = scores.found and not name.endswith(EXACT)
    return (name, *intervals, *(scores.found if is_table else (None,) * 3))


def _quantity(name: str, scores: Scores) -> Quantity:
    return Quantity(name=f"{name}: perplexity", value=scores.perplexity, unit="")


def _curve(name: str, budgets: Sequence[str], scores: Mapping[str, Scores], base: Scores) -> Curve:
    return Curve(
        figure="budget",
        name=name,
        x_label="table budget in MiB",
        y_label="perplexity over the base model's",
        x=tuple(parse_bytes(budget) / 2**20 for budget in budgets),
        y=tuple(perplexity_ratio(scores[budget], base).value for budget in budgets),
        y_unit="times",
    )


def _distilled_folder(text: str) -> tuple[int, Path]:
    layers, _, folder = text.partition("=")
    if not (layers.isdigit() and folder):
        raise argparse.ArgumentTypeError(f"{text!r} is not K=FOLDER, such as 3=distilled-3")
    return int(layers), Path(folder)


def read_study(argv: Sequence[str] | None) -> tuple[Study, Path, str, bool]:
    """Reads the command line: the study, where the result goes, the command, and whether it is quick."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{NAME}", description=QUESTION)
    parser.add_argument(
        "--model", type=Path, required=True, help="folder, as benchmarks.small_gpt2 writes it"
    )
    parser.add_argument(
        "--distilled",
        type=_distilled_folder,
        action="append",
        default=[],
        metavar="K=DIR",
        help="a distilled form, as benchmarks.distil_gpt2 writes it; may be repeated",
    )
    parser.add_argument(
        "--text", type=Path, help="folder of train.jsonl and held_out.jsonl; default: the model's parent"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / f"{NAME}.json", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="small sizes: proves that it runs, nothing else")
    options = parser.parse_args(argv)
    num_layers = GPT2Config.from_pretrained(options.model).n_layer
    distilled = dict(options.distilled)
    possible = tuple(sorted({layers for layers in (2, 3, 4) if layers < num_layers} | {*distilled}))
    study = Study(
        model=options.model,
        distilled=distilled,
        text=options.text or options.model.parent,
        plot_layers=(tuple(distilled) or possible[:1]) if options.quick else possible,
        budgets=("256KiB",) if options.quick else ("1MiB", "8MiB", "64MiB"),
        documents=30 if options.quick else 1500,
        train_documents=500 if options.quick else None,
    )
    command = recorded_command(NAME, argv)
    return study, options.out, command, options.quick


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    study, out, command, is_quick = read_study(argv)
    result = measure(study, out, command, is_quick=is_quick)
    print("\n".join(result.table_lines()))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
