"""Task accuracy on given inputs of the upper layers: adapters and a head trained by the engine's own loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.composition_rules import Held, corrected
from benchmarks.composition_study import DROPPED, PAIR_RULES, PLACEHOLDER, TRIPLE_RULES, ZERO_OUTSIDE, Study
from benchmarks.composition_texts import StudyTexts
from hmi_engine.construct.trainable_adapter import TrainableAdapter
from hmi_engine.construct.trainable_tenant import TrainableTenant
from hmi_engine.construct.training import TrainingSettings
from hmi_engine.construct.training_cache import HiddenStateCache
from hmi_engine.construct.training_loop import TrainingTask, fit
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.models.bert import HierarchicalBert

__all__ = ["BASELINES", "Trainer", "coverage_accuracies", "general_info", "rule_accuracies"]

PLAIN = "plain base model below the adapters"
HYBRID = "window 2, n-grams of the corpus: placeholder, corrected by trigrams' own tokens"
BASELINES = {
    2: f"window 2, n-grams of the corpus: {DROPPED}",
    3: f"window 3, n-grams of the corpus: {ZERO_OUTSIDE}",
}
"""Today's rule by width: what the others are compared with."""

_CHOSEN: dict[int, tuple[tuple[str, str], ...]] = {
    2: (
        ("all n-grams", DROPPED),
        ("n-grams of the corpus", DROPPED),
        ("n-grams of the corpus", PLACEHOLDER),
        ("no n-grams", DROPPED),
        ("no n-grams", PLACEHOLDER),
    ),
    3: (
        ("all n-grams", ZERO_OUTSIDE),
        ("n-grams of the corpus", ZERO_OUTSIDE),
        ("n-grams of the corpus", "additive, placeholder everywhere"),
        ("no n-grams", "additive, placeholder everywhere"),
    ),
}
"""Table and rule by width: the best by row error and probe, and the ends of the scale."""


def general_info(model: HierarchicalBert, source: str) -> GeneralInfo:
    """The base model as adapters are checked against it; no store identifies its rows."""
    shape = model.configuration
    return GeneralInfo(
        family="bert",
        source=source,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        placeholder_token_id=None,
        vocab_size=shape.vocab_size,
        max_positions=shape.max_positions,
        plot_layers=model.plot_layers,
        window=2,
        row_dtype="float32",
        tokenizer_sha256="",
        domain_layers="",
    )


@dataclass(frozen=True)
class Trainer:
    """Trains one set's task on different inputs by the same recipe, and scores the held-out texts.

    Attributes:
        model: the base.
        general: its description.
        texts: the set.
        settings: the recipe; its seed is replaced.
    """

    model: HierarchicalBert
    general: GeneralInfo
    texts: StudyTexts
    settings: TrainingSettings

    def accuracies(self, inputs: Tensor, served: Mapping[str, Tensor], seed: int) -> dict[str, float]:
        """Trains on ``inputs`` float32 [T, H] of layer K, then scores on each of ``served``, of that shape.

        Returns the share of right answers on the held-out texts by name.
        """
        settings = self.settings.model_copy(update={"seed": seed})
        generator = torch.Generator().manual_seed(seed)
        objective, data = self.texts.objective, self.texts.train
        split = objective.split(data, settings.validation_fraction, generator)
        tenant = self._new_tenant(generator)
        states = self._cache(inputs).advanced(tenant.layers)
        fit(TrainingTask(states, data, split, objective), tenant, settings, generator)
        return {
            name: self._score(tenant, states if states_served is inputs else self._cache(states_served))
            for name, states_served in served.items()
        }

    def _new_tenant(self, generator: torch.Generator) -> TrainableTenant:
        adapter = TrainableAdapter(
            self.general,
            kind=self.settings.block_kind,
            rank=self.settings.rank,
            layers=self.general.upper_layers,
            activation=self.settings.activation,
            generator=generator,
        )
        return TrainableTenant(self.model, adapter, self.texts.objective, generator)

    def _cache(self, inputs: Tensor) -> HiddenStateCache:
        token_ids = [*self.texts.train.encoded.token_ids, *self.texts.test.encoded.token_ids]
        return HiddenStateCache(inputs, self.texts.sequences.offsets, token_ids, rates=None)

    def _score(self, tenant: TrainableTenant, states: HiddenStateCache) -> float:
        test = self.texts.test
        first = len(self.texts.train)
        behind = replace(test, readings=[(first + number,) for number in range(len(test))])
        outputs = tenant.predict(states, behind, range(len(test)))
        return self.texts.objective.measure(outputs, test, range(len(test)), resamples=0).accuracy


def rule_accuracies(study: Study, trainer: Trainer, seed: int) -> dict[str, float]:
    """Accuracy of the plain model, and of each chosen rule under its table, by name."""
    found = {PLAIN: _alike(trainer, study.context, seed)}
    for width, chosen in _CHOSEN.items():
        rules = PAIR_RULES if width == 2 else TRIPLE_RULES
        for coverage, rule in chosen:
            merged = rules[rule](study)(_table(study, coverage))
            found[f"window {width}, {coverage}: {rule}"] = _alike(trainer, study.inputs(merged), seed)
    merged = PAIR_RULES[PLACEHOLDER](study)(study.found())
    merged = corrected(study.rows, merged, study.texts.triples.held(), slots="own token")
    return found | {HYBRID: _alike(trainer, study.inputs(merged), seed)}


def _table(study: Study, coverage: str) -> Held:
    tables = {
        "all n-grams": study.everything,
        "n-grams of the corpus": study.found,
        "no n-grams": study.nothing,
    }
    return tables[coverage]()


def _alike(trainer: Trainer, inputs: Tensor, seed: int) -> float:
    """Accuracy where what is served is what was trained on."""
    return trainer.accuracies(inputs, {"alike": inputs}, seed)["alike"]


def coverage_accuracies(
    study: Study, trainer: Trainer, rates: Sequence[float], seed: int
) -> dict[str, list[float]]:
    """Accuracy at each share of n-grams that the table holds, by rule.

    Trained under the table that is served, and once more trained under a table of all n-grams.
    """
    rules = {
        f"window 2, {DROPPED}": PAIR_RULES[DROPPED],
        f"window 2, {PLACEHOLDER}": PAIR_RULES[PLACEHOLDER],
        f"window 3, {ZERO_OUTSIDE}": TRIPLE_RULES[ZERO_OUTSIDE],
    }
    found = {}
    for name, prepare in rules.items():
        merge = prepare(study)
        found[f"{name}, trained alike"] = [
            _alike(trainer, study.inputs(merge(study.at_random(rate))), seed) for rate in rates
        ]
        full = study.inputs(merge(study.everything()))
        served = {str(rate): study.inputs(merge(study.at_random(rate))) for rate in rates}
        by_rate = trainer.accuracies(full, served, seed)
        found[f"{name}, trained on all n-grams"] = [by_rate[str(rate)] for rate in rates]
    return found
