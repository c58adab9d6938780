"""How far are the engine's answers from those of the libraries that adapters come from?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.arguments import read_arguments
from benchmarks.parity_cases import RECORDED, Reference, largest_errors, peft_references, recorded_references
from benchmarks.result import BenchmarkResult, Table
from hmi_engine.demo.base_model import packaged_model

__all__ = ["main", "measure"]

NAME = "parity"
QUESTION = "How far are answers from those of the libraries that adapters come from?"
BAR = 1e-4
NUM_TEXTS = 8
MAX_WORDS = 28
NOTES = (
    "The largest absolute difference of any probability (regression: of any number) between engine and "
    "library that made the adapter, float32, random weights, texts of different lengths; all tenants of a "
    "table in one call of the engine.",
    "K = 0: the library's own whole model. K > 0: its adapted upper layers and head, on the input of layer K "
    "that the plain base gives by the formulas of docs/architecture.md, computed by transformers' modules.",
    "Without adapter: the same at K = 0 of the head alone, which tells how much there was to get wrong.",
    "PEFT computes in this run. The `adapters` library wants an older transformers; its outputs were "
    "recorded in an environment of its own (tests/interop/adapterhub_reference/make.py) on a tiny BERT.",
    "Head and settings of each row: `PEFT_CASES` of benchmarks/parity_cases.py, and `CASES` of "
    "tests/interop/adapterhub_reference/record.py.",
)


def measure(
    references: Mapping[str, Reference], base: Path, scratch: Path, depths: Sequence[int]
) -> dict[str, list[float]]:
    """The errors of each reference for each number of domain layers, and the first without the adapter."""
    columns = [largest_errors(base, scratch / f"store-{depth}", references, depth) for depth in depths]
    return {
        name: [*(column[name].error for column in columns), columns[0][name].without_adapter]
        for name in references
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Compares, and writes ``benchmarks/results/parity.json``."""
    arguments = read_arguments(NAME, QUESTION, argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    base = RECORDED / "base" if arguments.quick else packaged_model()
    depth = 2 if arguments.quick else 3
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        references = dict(peft_references(base, scratch / "folders", _inputs(base), depth))
        peft = measure(references, base, scratch / "peft", (0, depth))
        recorded = dict(recorded_references())
        hub_depth = max(next(iter(recorded.values())).logits)
        hub = measure(recorded, RECORDED / "base", scratch / "adapterhub", (0, hub_depth))
    tables = [
        _table(f"PEFT, base {'small random BERT' if arguments.quick else 'MiniLM'}", peft, depth),
        _table("AdapterHub's `adapters` 1.3.0, small random base", hub, hub_depth),
    ]
    result = BenchmarkResult.of(
        arguments,
        NAME,
        QUESTION,
        settings={"bar": f"{BAR:.0e}", "texts": NUM_TEXTS},
        notes=NOTES,
        tables=tables,
    )
    result.write(arguments.out)
    worst = max(error for errors in (*peft.values(), *hub.values()) for error in errors[:-1])
    print(f"{len(peft) + len(hub)} kinds, largest error {worst:.1e} (bar {BAR:.0e}); wrote {arguments.out}")
    if worst > BAR:
        raise SystemExit(1)


def _inputs(base: Path) -> list[list[int]]:
    """Random tokens between the special ones, of different lengths."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    generator = torch.Generator().manual_seed(5)
    lengths = torch.linspace(1, MAX_WORDS, NUM_TEXTS).int().tolist()
    draw = [
        torch.randint(5, tokenizer.vocab_size, (length,), generator=generator).tolist() for length in lengths
    ]
    return [[tokenizer.cls_token_id, *tokens, tokenizer.sep_token_id] for tokens in draw]


def _table(title: str, errors: Mapping[str, Sequence[float]], depth: int) -> Table:
    rows = tuple((name, *values) for name, values in errors.items())
    return Table(
        title=title, columns=("kind and head", "K = 0", f"K = {depth}", "without adapter"), rows=rows
    )


if __name__ == "__main__":
    main()
