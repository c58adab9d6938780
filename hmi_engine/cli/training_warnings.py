"""What is worth a second look about a tenant that was just trained."""

from __future__ import annotations

from hmi_engine.cli.output import warn
from hmi_engine.construct.training import TrainingReport

__all__ = ["warn_of_training"]

_ALMOST_ALL, _FEW = 0.95, 0.5
"""Shares of n-grams in the tables, and of texts in their corpora, that do not go together in new text."""


def warn_of_training(report: TrainingReport, whose: str = "") -> None:
    """Warns on standard error, each line beginning with ``whose``."""
    if cut := report.num_cut + report.test_num_cut:
        warn(f"{whose}{cut} texts were cut to {report.settings.max_tokens} tokens; max_tokens sets how many")
    if unseen := report.unvalidated_labels:
        warn(
            f"{whose}no validation example has the label {unseen[0]!r:.80}"
            + (f" or {len(unseen) - 1} more" if len(unseen) > 1 else "")
            + ": validation figures say nothing of it"
        )
    values = (report.test or report.validation).values
    if "majority_accuracy" in values and values["accuracy"] <= values["majority_accuracy"]:
        warn(
            f"{whose}it does no better than always giving the commonest label; more examples, balanced class "
            "weights or a teacher may help"
        )
    _warn_of_tables(report, whose)
    if report.divergence:
        warn(f"{whose}the training ended early, and its best epoch was kept: {report.divergence}")


def _warn_of_tables(report: TrainingReport, whose: str) -> None:
    """Only whole documents of a corpus are cross-fitted: not text that it holds cut in another way."""
    rates = report.hit_rates
    num_texts = report.num_training + report.validation.num_examples
    num_texts += 0 if report.teacher is None else report.teacher.num_unlabelled
    if rates and rates.looked_up > _ALMOST_ALL and rates.texts_in_corpus < _FEW * num_texts:
        warn(
            f"{whose}{rates.looked_up:.0%} of the n-grams are in the domain's tables, but only "
            f"{rates.texts_in_corpus} of {num_texts} texts are documents of their corpora; if these hold the "
            "training text cut in another way, it finds more than new text will: make the domain from the "
            "same texts, or train for --miss exact"
        )
