"""What does a window without a row cost, and from which hit rate on does each policy beat the plain model?"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from benchmarks.arguments import Arguments, read_arguments, read_texts
from benchmarks.miss_costs import miss_cases, sixty_four_token_sequences
from benchmarks.miss_throughput import WARM_UP, throughput
from benchmarks.result import BenchmarkResult, Case, Curve, Quantity
from hmi_engine.demo.base_model import packaged_model
from hmi_engine.demo.tasks import DemoData
from hmi_engine.errors import HmiError
from hmi_engine.store import Store

__all__ = ["main", "measure"]

QUESTION = "What does a missing window cost, and from which hit rate on is each miss policy worth its table?"
DOMAIN = "everything"
MAX_WORDS = 60
NOTES = (
    'The ratio "over it" of the plain layers is the price of one window in tokens of the plain model: its '
    "tokens a second through the K domain layers, over the windows a second of the system in that row.",
    "A distinct window: all windows of the texts that have no row, each once. A missed occurrence: the same "
    "texts in batches of 32 sequences, one window for each token whose window has no row; the last two rows "
    "search as well, and the last one starts with an empty overlay.",
    "All slots of the last domain layer are computed: the merge reads every slot of every window (slot s of "
    "the window that begins s places before a token), so leaving any out is no option for an encoder.",
    "Throughput: whole engines, token ids in, scores out, one tenant without adapter blocks; the texts of "
    "each repetition are new to all systems. So that every hit rate can be reached, the tables are made of "
    "these very texts, and cut; what tables reach on new text is another benchmark's question.",
    "An engine finds more than its table holds: what it computed earlier. Its row says how much it found.",
)


@dataclass(frozen=True)
class _Plan:
    """Sizes of a run."""

    batches: int
    batch_size: int
    repetitions: int
    texts_per_round: int
    rounds: int
    shares: tuple[float, ...]


QUICK = _Plan(1, 4, 2, 4, 3, (0.0, 1.0))
FULL = _Plan(16, 32, 7, 96, 8, (0.0, 0.25, 0.5, 0.75, 0.9, 1.0))


def measure(arguments: Arguments) -> BenchmarkResult:
    """Measures both widths of windows."""
    plan = QUICK if arguments.quick else FULL
    data = read_texts(arguments, max_words=MAX_WORDS)
    cases: list[Case] = []
    curves: list[Curve] = []
    quantities: list[Quantity] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        with Store.create(path / "plain", general=packaged_model(), plot_layers=0) as plain:
            for window in (2, 3):
                for part in _measure_window(path, plain, window, data, plan):
                    cases += part[0]
                    quantities += part[1]
                    curves += part[2]
    return BenchmarkResult.of(
        arguments,
        "miss",
        QUESTION,
        settings={"text": data.source, "plot_layers": 3, "repetitions": plan.repetitions},
        notes=NOTES,
        cases=cases,
        quantities=quantities,
        curves=curves,
    )


_Part = tuple[list[Case], list[Quantity], list[Curve]]


def _measure_window(
    folder: Path, plain: Store, window: Literal[2, 3], data: DemoData, plan: _Plan
) -> list[_Part]:
    held_out = _held_out(data)
    path = folder / f"window{window}"
    with Store.create(path, general=packaged_model(), plot_layers=3, window=window) as store:
        corpus = dict.fromkeys(text for domain in data.domains for text in domain.texts)
        store.add_domain(DOMAIN, iter(corpus))
        sequences = sixty_four_token_sequences(store.encoder.token_ids(held_out), plan.batch_size)
        costs, shares = miss_cases(store, DOMAIN, sequences[: plan.batches], plan.repetitions)
        speeds, curves, places = throughput(store, plain, _rounds(held_out, plan), plan.shares)
    return [(costs, shares, []), (speeds, places, curves)]


def _held_out(data: DemoData) -> list[str]:
    corpus = {text for domain in data.domains for text in domain.texts}
    texts = dict.fromkeys(example.text for task in data.tasks for example in task.test)
    return [text for text in texts if text not in corpus]


def _rounds(texts: Sequence[str], plan: _Plan) -> list[list[str]]:
    """New texts for each repetition."""
    rounds = [list(texts[number :: plan.rounds])[: plan.texts_per_round] for number in range(plan.rounds)]
    if not all(rounds) or len(rounds) <= WARM_UP:
        raise HmiError(f"{len(texts)} held-out texts do not fill {plan.rounds} rounds; give --data more")
    return rounds


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and writes the result."""
    arguments = read_arguments("miss", QUESTION, argv)
    measure(arguments).write(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
