"""What may stand in for a row that the table lacks, and what does it cost?"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from pydantic import JsonValue

from benchmarks.arguments import Arguments, read_arguments
from benchmarks.composition_findings import (
    MIB,
    Figures,
    Findings,
    collect,
    curves,
    merged_findings,
    quantities,
)
from benchmarks.composition_probes import (
    budget_shares,
    context_shares,
    hybrid_shares,
    row_errors,
    rule_shares,
)
from benchmarks.composition_study import PAIR_RULES, TRIPLE_RULES, Study, open_study
from benchmarks.composition_tasks import (
    Trainer,
    coverage_accuracies,
    general_info,
    rule_accuracies,
)
from benchmarks.composition_texts import Sizes, StudyTexts, TextSet, documentation_sets, folder_sets, prepare
from benchmarks.result import BenchmarkResult
from hmi_engine.construct.training import TrainingSettings
from hmi_engine.demo.base_model import PACKAGE, packaged_model
from hmi_engine.errors import UnsupportedModelError
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.bert_loading import import_bert, load_bert_configuration
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["main", "measure"]

QUESTION = "What may stand in for a row that the table lacks, and what does it cost?"
MASK_TOKEN = "[MASK]"
NOTES = (
    "Undistilled, K = N/2 unless said otherwise. All is in plain torch on the engine's base model; a test "
    "holds today's rules to the engine's merge. Sets run beside one another, one thread each.",
    "A table holds what its corpus (the whole training split) has twice. Training texts are looked up "
    "without their own fold of the corpus; errors, probes and accuracies are those of held-out texts.",
    "Row error: length of the difference from the merge of a table of all n-grams over the length of that "
    "merge. Probe: share of the variance of the plain model's states after K layers that a linear map "
    "recovers on held-out texts, the map fitted on training texts.",
    "Accuracy: bottleneck adapters and a head on the upper layers by the engine's own training loop, trained "
    "on what is served. The +- is the standard error of the difference from today's rule over sets and "
    "seeds, each pair of runs alike in all but the rule.",
    "Placeholder: a token's rows beside [MASK], (MASK, b) for a missing left bigram and (b, MASK) for a "
    "right one; no corpus is needed, and two rows a token.",
)


@dataclass(frozen=True)
class _Plan:
    """Sizes of a run."""

    sizes: Sizes
    probe_sizes: Sizes
    seeds: int
    epochs: int
    rates: tuple[float, ...]
    budgets: tuple[int, ...]
    min_texts_for_curves: int


FULL = _Plan(
    sizes=Sizes(500, 500, 48),
    probe_sizes=Sizes(250, 150, 48),
    seeds=2,
    epochs=4,
    rates=(1.0, 0.75, 0.5, 0.25, 0.0),
    budgets=(2 * MIB, 8 * MIB, 32 * MIB, 128 * MIB),
    min_texts_for_curves=300,
)
QUICK = _Plan(
    sizes=Sizes(60, 40, 24),
    probe_sizes=Sizes(40, 20, 24),
    seeds=1,
    epochs=1,
    rates=(1.0, 0.5, 0.0),
    budgets=(MIB, 8 * MIB),
    min_texts_for_curves=1,
)


def _read(arguments: Arguments, sizes: Sizes) -> list[TextSet]:
    if arguments.data is not None:
        sets = folder_sets(arguments.data, sizes)
    else:
        sets = documentation_sets(sizes, num_topics=1 if arguments.quick else 3)
    return sets[:1] if arguments.quick else sets


@dataclass(frozen=True)
class _Base:
    """The base model's folder, its tokenizer and the id of its placeholder."""

    folder: Path
    max_tokens: int
    placeholder: int

    @classmethod
    def load(cls, folder: Path) -> _Base:
        configuration, placeholder = import_bert(str(packaged_model()), folder)
        if placeholder is None:
            raise UnsupportedModelError(f"the tokenizer of {PACKAGE} has no token to stand for a word")
        return cls(folder, configuration.max_positions, placeholder)

    @functools.cached_property
    def encoder(self) -> TextEncoder:
        return TextEncoder(self.folder, self.max_tokens)

    @property
    def half_of_the_layers(self) -> int:
        return load_bert_configuration(self.folder).num_layers // 2

    def study(self, texts: StudyTexts, plot_layers: int) -> Study:
        return open_study(HierarchicalBert.load(self.folder, plot_layers), texts, self.placeholder)


def _study_rows(study: Study, plan: _Plan) -> Findings:
    """Errors and probes of one set."""
    findings = Findings()
    for width, rules in ((2, PAIR_RULES), (3, TRIPLE_RULES)):
        coverages = {"n-grams of the corpus": study.found()}
        if width == 2:
            coverages["no bigram"] = study.nothing()
        else:
            coverages["all bigrams, no trigram"] = study.every_pair()
        for name, (before, after) in row_errors(study, rules, coverages).items():
            collect(findings.errors, {f"window {width}, {name}": before})
            collect(findings.errors_after, {f"window {width}, {name}": after})
        shares = rule_shares(study, rules, coverages)
        collect(findings.shares, {f"window {width}, {name}": value for name, value in shares.items()})
    collect(findings.shares, {f"hybrid, {name}": value for name, value in hybrid_shares(study).items()})
    for plan_name, shares_by_budget in budget_shares(study, plan.budgets).items():
        named = {str(budget): value for budget, value in zip(plan.budgets, shares_by_budget, strict=True)}
        collect(findings.budgets.setdefault(plan_name, {}), named)
    return findings


def _hit_rates(texts: StudyTexts) -> Figures:
    rates = {}
    for name, frequencies in (("bigrams", texts.pairs), ("trigrams", texts.triples)):
        exists = ~texts.tokens_in_training & (frequencies.keys != 0)
        rate = frequencies.held()[exists].double().mean()
        rates[f"{texts.name}: held-out {name} that its corpus of {texts.corpus_tokens:,} tokens has"] = [
            float(rate)
        ]
    return rates


def _study_tasks(study: Study, plan: _Plan, findings: Findings, settings: TrainingSettings) -> None:
    """Accuracies of one set."""
    trainer = Trainer(study.model, general_info(study.model, PACKAGE), study.texts, settings)
    name = study.texts.name
    for seed in range(plan.seeds):
        found = rule_accuracies(study, trainer, seed)
        collect(findings.accuracies.setdefault(name, {}), found)
        print(name, seed, json.dumps({rule: round(value, 3) for rule, value in found.items()}), flush=True)
    if len(study.texts.test) < plan.min_texts_for_curves:
        return
    for curve, by_rate in coverage_accuracies(study, trainer, plan.rates, seed=0).items():
        named = {str(rate): value for rate, value in zip(plan.rates, by_rate, strict=True)}
        collect(findings.coverage.setdefault(curve, {}).setdefault(name, {}), named)
        print(name, curve, [round(value, 3) for value in by_rate], flush=True)


@torch.no_grad()
def _study_set(
    base: _Base, texts: TextSet, probed: TextSet, plan: _Plan, settings: TrainingSettings
) -> Findings:
    depth = base.half_of_the_layers
    findings = _study_rows(base.study(prepare(probed, base.encoder, plan.probe_sizes), depth), plan)
    prepared = prepare(texts, base.encoder, plan.sizes)
    findings.hit_rates.update(_hit_rates(prepared))
    _study_tasks(base.study(prepared, depth), plan, findings, settings)
    return findings


@torch.no_grad()
def _study_depths(base: _Base, probed: TextSet, plan: _Plan) -> dict[int, dict[str, float]]:
    """The probe table of a set for each number of domain layers up to half."""
    texts = prepare(probed, base.encoder, plan.probe_sizes)
    depths = range(1, base.half_of_the_layers + 1)
    return {depth: context_shares(base.study(texts, depth)) for depth in depths}


def _pool(is_quick: bool, num_workers: int) -> Executor:
    """A process of one thread for each set; a quick run is over before they would have started."""
    if is_quick:
        return ThreadPoolExecutor(1)
    return ProcessPoolExecutor(
        num_workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )


def measure(arguments: Arguments) -> BenchmarkResult:
    """Runs the whole study."""
    plan = QUICK if arguments.quick else FULL
    settings = TrainingSettings(
        max_epochs=plan.epochs,
        patience=plan.epochs,
        max_tokens=plan.sizes.max_tokens,
        batch_size=8,
        learning_rate=3e-3,
    )
    with tempfile.TemporaryDirectory() as folder:
        base = _Base.load(Path(folder) / "general")
        sets, probed = _read(arguments, plan.sizes), _read(arguments, plan.probe_sizes)
        largest = max(probed, key=lambda texts: sum(map(len, texts.corpus)))
        with _pool(arguments.quick, len(sets) + 1) as processes:
            futures = [
                processes.submit(_study_set, base, texts, fewer, plan, settings)
                for texts, fewer in zip(sets, probed, strict=True)
            ]
            layers = processes.submit(_study_depths, base, largest, plan).result()
            findings = merged_findings([future.result() for future in futures])
    return BenchmarkResult.of(
        arguments,
        "composition",
        QUESTION,
        settings=_described(sets, plan, settings),
        notes=NOTES,
        quantities=tuple(quantities(findings, layers)),
        curves=tuple(curves(findings, plan.rates, plan.budgets)),
    )


def _described(sets: Sequence[TextSet], plan: _Plan, settings: TrainingSettings) -> dict[str, JsonValue]:
    described: dict[str, JsonValue] = {
        "model": PACKAGE,
        "sets": [texts.name for texts in sets],
        "training_texts": plan.sizes.train,
        "held_out_texts": plan.sizes.test,
        "seeds": plan.seeds,
    }
    return described | settings.model_dump(mode="json", exclude={"seed"}, exclude_none=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("composition", QUESTION, argv)
    result = measure(arguments)
    result.write(arguments.out)
    for quantity in result.quantities:
        print(f"{quantity.name}: {quantity.value:.3f} {quantity.unit}")
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
