"""Trains a small GPT-2 from scratch on text that every machine has, where no pretrained one can be had."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.recorded_command import recorded_command
from benchmarks.small_gpt2_text import (
    END,
    Document,
    data_documents,
    installed_documents,
    pack,
    read_documents,
    split_text,
    write_documents,
)
from benchmarks.small_gpt2_training import (
    Batches,
    Checkpoint,
    Curve,
    Precision,
    Recipe,
    Report,
    progress_bar,
    tensors_sha256,
    train,
)
from hmi_engine.demo.environment import describe_machine, installed_versions
from hmi_engine.knowledge.atomic import atomic_write

__all__ = ["Sizes", "build_tokenizer", "language_loss", "main", "prepare_text", "train_gpt2"]

QUICK_MODULES = ("json", "email", "http", "argparse", "asyncio", "logging", "unittest")
MEASURED_SEQUENCES = 64
"""Held-out sequences that are measured now and then; all are at the end."""


@dataclass(frozen=True)
class Sizes:
    """Of the model."""

    layers: int
    hidden: int
    heads: int
    vocab: int
    positions: int

    def config(self, vocab_size: int, end: int) -> GPT2Config:
        """As transformers describes it: GPT-2 without dropout, as no text is read more than a few times."""
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=self.positions,
            n_embd=self.hidden,
            n_layer=self.layers,
            n_head=self.heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
            use_cache=True,
        )


FULL = Sizes(layers=6, hidden=256, heads=4, vocab=8192, positions=256)
QUICK = Sizes(layers=4, hidden=64, heads=4, vocab=512, positions=64)
FULL_STEPS, QUICK_STEPS = 1000, 30


def prepare_text(
    out: Path, *, data: Path | None, seed: int, modules: Sequence[str] | None = None
) -> tuple[list[Document], list[Document]]:
    """Collects (train, held out) and keeps them as ``train.jsonl`` and ``held_out.jsonl``, or reads these."""
    train_path, held_out_path = out / "train.jsonl", out / "held_out.jsonl"
    if not train_path.exists():
        more = data_documents(data) if data is not None else ([], [])
        split = split_text(installed_documents(modules), seed=seed, more=more)
        write_documents(held_out_path, split.held_out)
        write_documents(train_path, split.train)
    return read_documents(train_path), read_documents(held_out_path)


def build_tokenizer(documents: Sequence[Document], vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer as GPT-2's, trained on the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    return tokenizer


def _kept_tokenizer(out: Path, documents: Sequence[Document], vocab: int) -> Tokenizer:
    path = out / "tokenizer.json"
    if not path.exists():
        tokenizer = build_tokenizer(documents, vocab)
        atomic_write(path, lambda partial: tokenizer.save(str(partial)))
    return Tokenizer.from_file(str(path))


def language_loss(model: GPT2LMHeadModel, sequences: Tensor) -> Tensor:
    """Mean cross-entropy of each next token of sequences [B, P]."""
    logits = model(input_ids=sequences, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).float(), sequences[:, 1:].flatten())


@torch.no_grad()
def _perplexity(model: GPT2LMHeadModel, sequences: Tensor, batch: int) -> float:
    total = sum(float(language_loss(model, part)) * len(part) for part in sequences.split(batch))
    return math.exp(total / len(sequences))


def train_gpt2(
    out: Path,
    documents: tuple[Sequence[Document], Sequence[Document]],
    sizes: Sizes,
    recipe: Recipe,
    *,
    report: Report,
    device: str = "cpu",
    settings: dict[str, Any] | None = None,
) -> float:
    """Trains a model on (train, held out) documents, or goes on; returns its perplexity on the latter.

    Writes ``model`` (a folder in transformers' format) and ``training.json`` below ``out``.

    Raises:
        CheckpointError: ``out`` holds the checkpoint of another training.
        TrainingDivergedError: a loss is no number.
    """
    learned, held_out = documents
    tokenizer = _kept_tokenizer(out, learned, sizes.vocab)
    sequences, unseen = (pack(side, tokenizer, sizes.positions).to(device) for side in (learned, held_out))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        config = sizes.config(tokenizer.get_vocab_size(), tokenizer.token_to_id(END))
        model = GPT2LMHeadModel(config).to(device)
    batches = Batches(sequences, recipe.batch, recipe.seed)
    task = {
        "sizes": vars(sizes),
        "recipe": recipe.model_dump(mode="json"),
        "text": tensors_sha256(sequences, unseen),
    }
    checkpoint = Checkpoint(out / "checkpoint.safetensors", task)

    def measure() -> dict[str, float]:
        return {"perplexity": _perplexity(model, unseen[:MEASURED_SEQUENCES], recipe.batch)}

    curve = train(
        model,
        recipe,
        lambda step: language_loss(model, batches.at(step)),
        measure,
        checkpoint,
        report,
    )
    perplexity = _perplexity(model, unseen, recipe.batch)
    _write_model(out / "model", model, tokenizer, sizes.positions)
    written = {
        **task,
        **(settings or {}),
        "train_documents": len(learned),
        "train_tokens": sequences.numel(),
        "epochs": recipe.steps * recipe.batch / len(sequences),
        "held_out_documents": len(held_out),
        "held_out_tokens": unseen.numel(),
        "held_out_perplexity": perplexity,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    _write_report(out / "training.json", written, curve)
    checkpoint.remove()
    return perplexity


def _write_model(folder: Path, model: GPT2LMHeadModel, tokenizer: Tokenizer, positions: int) -> None:
    model.cpu().eval().save_pretrained(folder)
    special = {"bos_token": END, "eos_token": END, "unk_token": END}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=positions, **special
    ).save_pretrained(folder)


def _write_report(path: Path, written: dict[str, Any], curve: Curve) -> None:
    contents = {
        **written,
        "machine": describe_machine().model_dump(mode="json"),
        "versions": installed_versions().model_dump(mode="json"),
        **curve.model_dump(),
    }
    text = json.dumps(contents, indent=1) + "\n"
    atomic_write(path, lambda partial: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.small_gpt2", description=__doc__)
    parser.add_argument("out", type=Path, help="folder for text, model and report; a training goes on in it")
    parser.add_argument("--data", type=Path, help="folder of JSON lines whose `text` is learned too")
    parser.add_argument("--quick", action="store_true", help="small sizes: proves that it runs, nothing else")
    for name in ("layers", "hidden", "heads", "vocab", "positions"):
        parser.add_argument(f"--{name}", type=int, help=f"default {getattr(FULL, name)}")
    parser.add_argument("--steps", type=int, help=f"default {FULL_STEPS}")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at its highest")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--mixed-precision", choices=get_args(Precision), default="no")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the model, or goes on with it."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parse(argv)
    defaults = QUICK if options.quick else FULL
    sizes = Sizes(**{name: getattr(options, name) or value for name, value in vars(defaults).items()})
    recipe = Recipe(
        steps=options.steps or (QUICK_STEPS if options.quick else FULL_STEPS),
        batch=options.batch,
        learning_rate=options.learning_rate,
        seed=options.seed,
        mixed_precision=options.mixed_precision,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    modules = QUICK_MODULES if options.quick else None
    documents = prepare_text(options.out, data=options.data, seed=options.seed, modules=modules)
    print(f"{len(documents[0])} documents to learn from, {len(documents[1])} held out", flush=True)
    settings = {"command": recorded_command("small_gpt2", argv)}
    with progress_bar("training") as report:
        perplexity = train_gpt2(
            options.out, documents, sizes, recipe, report=report, device=options.device, settings=settings
        )
    print(f"held-out perplexity {perplexity:.1f}; wrote {options.out / 'model'}")


if __name__ == "__main__":
    main()
