"""A card as Markdown, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hmi_engine.construct.bootstrap import CONFIDENCE
from hmi_engine.construct.model_card import ModelCard
from hmi_engine.construct.training_metrics import Metrics
from hmi_engine.construct.training_settings import SearchReport, TrainingReport

__all__ = ["card_markdown", "figure"]


def card_markdown(card: ModelCard) -> str:
    """The card's text, which ends in a line end."""
    report = card.training
    parts = [
        f"# {card.tenant}",
        f"A {report.settings.task} tenant of domain `{card.domain}`, trained on {card.created:%Y-%m-%d} for "
        f"miss policy `{report.settings.miss}`. An engine with another policy warns.",
        "## How well it does",
        _figures(report),
        f"In brackets: {CONFIDENCE:.0%} percentile bootstrap intervals over the examples. The best epoch was "
        f"chosen by `{report.best_by}` on the validation examples, so only test figures are unbiased.",
        "## Data",
        _table(("what", "value"), _data(report)),
        "## Training",
        _table(("setting", "value"), _settings(report)),
        f"{report.num_parameters} parameters, epoch {report.best_epoch + 1} of {len(report.history)} kept, "
        f"{report.seconds:.1f} s."
        + (f" The training ended early: {report.divergence}." if report.divergence else ""),
        *_search(report.search),
        "## Base",
        _table(
            ("what", "value"),
            [
                ("model", card.base),
                ("digest of its files (SHA-256)", card.base_sha256),
                ("layers that are looked up", str(card.plot_layers)),
                ("window", str(card.window)),
                ("Python", card.versions.python),
                *card.versions.packages.items(),
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def figure(metrics: Metrics, name: str) -> str:
    """A figure with its interval, such as ``0.812 (0.790 to 0.833)``."""
    text = f"{metrics.values[name]:.3f}"
    if name in metrics.intervals:
        low, high = metrics.intervals[name]
        text += f" ({low:.3f} to {high:.3f})"
    return text


def _figures(report: TrainingReport) -> str:
    splits = [("validation", report.validation)]
    if report.test is not None:
        splits.append(("test", report.test))
    if report.teacher is not None:
        splits.append(("its teacher, validation", report.teacher.validation))
        if report.teacher.test is not None:
            splits.append(("its teacher, test", report.teacher.test))
    names = list(dict.fromkeys(name for _, metrics in splits for name in metrics.values))
    header = ("figure", *(f"{split} ({metrics.num_examples} examples)" for split, metrics in splits))
    rows = [
        (name, *(figure(metrics, name) if name in metrics.values else "" for _, metrics in splits))
        for name in names
    ]
    return _table(header, rows)


def _data(report: TrainingReport) -> Iterable[tuple[str, str]]:
    yield "training examples", str(report.num_training)
    yield "training and validation examples (SHA-256)", report.data_sha256
    if report.test_sha256 is not None:
        yield "test examples (SHA-256)", report.test_sha256
    if report.teacher is not None:
        yield "digest of the teacher's weights (SHA-256)", report.teacher.sha256
        yield "texts that only the teacher labelled", str(report.teacher.num_unlabelled)
        if report.teacher.texts_sha256 is not None:
            yield "these texts (SHA-256)", report.teacher.texts_sha256
    if report.labels:
        yield "labels", ", ".join(report.labels)
    if report.unvalidated_labels:
        yield "labels that no validation example has", ", ".join(report.unvalidated_labels)
    limit = f"texts cut to {report.settings.max_tokens} tokens"
    yield limit, f"{report.num_cut} (test: {report.test_num_cut})"
    for name, rates in (("", report.hit_rates), (" of the test examples", report.test_hit_rates)):
        if rates is not None:
            yield (
                f"n-grams in the tables{name}",
                f"{rates.looked_up:.1%}, {rates.cross_fitted:.1%} cross-fitted",
            )


def _settings(report: TrainingReport) -> Iterable[tuple[str, str]]:
    settings = report.settings
    for name, value in settings.model_dump(mode="json", exclude_none=True).items():
        yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    if settings.learning_rate is None:
        yield "learning_rate", f"{settings.peak_learning_rate:g} (the kind's default)"


def _search(report: SearchReport | None) -> Iterable[str]:
    if report is None:
        return
    yield f"Searched with {report.budget_steps} steps in all:"
    yield _table(
        ("round", "learning rate", "rank", "steps", report.best_by),
        [
            (
                str(trial.round),
                f"{trial.learning_rate:g}",
                str(trial.rank),
                str(trial.steps),
                "diverged" if trial.value is None else f"{trial.value:.3f}",
            )
            for trial in report.trials
        ],
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
