"""Distils a GPT-2 into hierarchical form: its lowest blocks see windows of a token and those before it.

The student starts as a copy. It learns the teacher's hidden states where the rows are merged and after the
last block, and its next-token probabilities. Domain layers, merge (position table, LayerNorm) and upper
layers learn; embeddings and the final LayerNorm stay. N-grams are dropped at random, so that the upper layers
accept the rows of shorter ones.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from transformers import GPT2LMHeadModel

from benchmarks.distil_gpt2_student import HierarchicalStudent, States, drop_ngrams, teacher_states
from benchmarks.recorded_command import recorded_command
from benchmarks.small_gpt2_text import Document, pack, read_documents
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
from hmi_engine.construct.distillation_calibration import fit_layer_norm
from hmi_engine.demo.environment import describe_machine, installed_versions
from hmi_engine.knowledge.atomic import atomic_write
from hmi_engine.knowledge.tensor_file import write_tensors
from hmi_engine.models.general_folder import MERGE_FILE

__all__ = ["distil_gpt2", "distillation_loss", "main"]

FULL_STEPS, QUICK_STEPS = 600, 10
CALIBRATION_BATCHES = 8
MEASURED_SEQUENCES = 64
REPORT_FILE = "distillation.json"
TRAINABLE = ("domain layers", "merge position table", "merge LayerNorm", "upper layers")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def distillation_loss(student: States, teacher: States) -> Tensor:
    """How far merged and last states are apart, each layer-normalised, plus KL of next-token probabilities.

    Without the norm the few elements of a decoder's residual stream that are very large would be all that
    counts; the scale that it hides is learned through the states after the last block.
    """
    merged, last = (
        functional.mse_loss(_normalized(ours), _normalized(theirs))
        for ours, theirs in ((student.merged, teacher.merged), (student.last, teacher.last))
    )
    ours, theirs = (states.logits.flatten(0, 1).float().log_softmax(-1) for states in (student, teacher))
    return merged + last + functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def _normalized(states: Tensor) -> Tensor:
    return functional.layer_norm(states.float(), states.shape[-1:])


class _Distillation:
    """Student, teacher and text of one distillation."""

    def __init__(
        self,
        model: Path,
        documents: tuple[Sequence[Document], Sequence[Document]],
        *,
        plot_layers: int,
        window: int,
        recipe: Recipe,
        dropped_share: float,
        device: str,
    ) -> None:
        self._teacher = _load(model).to(device)
        self.student = HierarchicalStudent(_load(model), plot_layers, window).to(device)
        self._dropped_share, self._device = dropped_share, device
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        positions = self._teacher.config.n_positions
        sequences, unseen = (pack(side, tokenizer, positions).to(device) for side in documents)
        self.batches = Batches(sequences, recipe.batch, recipe.seed)
        self._measured = unseen[:MEASURED_SEQUENCES].split(recipe.batch)
        self._size = recipe.batch
        self.task = {
            "plot_layers": plot_layers,
            "window": window,
            "dropped_share": dropped_share,
            "recipe": recipe.model_dump(mode="json"),
            "base": tensors_sha256(*self._teacher.state_dict().values()),
            "text": tensors_sha256(sequences, unseen),
        }

    def loss_of(self, step: int) -> Tensor:
        """The loss of a step, its n-grams dropped by the step's own chance."""
        sequences = self.batches.at(step)
        return distillation_loss(self.student(sequences, self._lengths(step)), self._taught(sequences))

    def _lengths(self, step: int) -> Tensor:
        """How many tokens of their windows a step's tokens keep."""
        shape = self.batches.at(step).shape
        generator = self.batches.generator("n-grams", step)
        return drop_ngrams(shape, self.student.window, self._dropped_share, generator).to(self._device)

    def _taught(self, sequences: Tensor) -> States:
        return teacher_states(self._teacher, self.student.plot_layers, sequences)

    def calibrate(self) -> None:
        """Starts the merge from the LayerNorm that fits the teacher's states best."""

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            for step in range(CALIBRATION_BATCHES):
                sequences = self.batches.at(step)
                merged = self.student.merge(sequences, self._lengths(step))
                yield merged.flatten(0, 1), self._taught(sequences).merged.flatten(0, 1)

        fit_layer_norm(self.student.layer_norm, pairs())

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Held-out perplexities: of the teacher, and of the student with windows of each width alone."""
        found = {"teacher": self._perplexity(None)}
        for width in range(1, self.student.window + 1):
            found[f"student, {width} tokens"] = self._perplexity(width)
        return found

    def _perplexity(self, width: int | None) -> float:
        total, count = 0.0, 0
        for sequences in self._measured:
            if width is None:
                logits = self._taught(sequences).logits
            else:
                logits = self.student(sequences, torch.full_like(sequences, width)).logits
            wanted = sequences[:, 1:].flatten()
            total += float(functional.cross_entropy(logits[:, :-1].flatten(0, 1), wanted, reduction="sum"))
            count += len(wanted)
        return math.exp(total / count)


def distil_gpt2(
    model: Path,
    out: Path,
    documents: tuple[Sequence[Document], Sequence[Document]],
    recipe: Recipe,
    *,
    plot_layers: int,
    window: int = 3,
    dropped_share: float = 1.0,
    calibrated: bool = True,
    report: Report,
    device: str = "cpu",
    settings: dict[str, Any] | None = None,
) -> HierarchicalStudent:
    """Distils the model of a folder, or goes on; returns the student.

    Writes ``out``, a folder in transformers' format, with ``merge.safetensors`` and ``distillation.json``.

    Args:
        model: folder of the base model.
        out: folder of the result, and of the checkpoint while it is made.
        documents: to learn from, and held out.
        recipe: the optimisation.
        plot_layers: K.
        window: 2 or 3.
        dropped_share: the largest share of a sequence's n-grams that is dropped; 0 drops none.
        calibrated: whether the merge's LayerNorm starts from a fit, and not from weight 1 and bias 0.
        report: told after each step.
        device: where it is computed.
        settings: more to write into the report.

    Raises:
        CheckpointError: ``out`` holds the checkpoint of another distillation.
        TrainingDivergedError: a loss is no number.
        ValueError: the model has too few blocks, or the text is too short.
    """
    work = _Distillation(
        model,
        documents,
        plot_layers=plot_layers,
        window=window,
        recipe=recipe,
        dropped_share=dropped_share,
        device=device,
    )
    before = work.measure()
    if calibrated:
        work.calibrate()
    out.mkdir(parents=True, exist_ok=True)
    task = {**work.task, "calibrated": calibrated}
    checkpoint = Checkpoint(out / "checkpoint.safetensors", task)
    curve = train(work.student, recipe, work.loss_of, work.measure, checkpoint, report)
    student = work.student.cpu()
    written = {"source": str(model), **task, **(settings or {}), "undistilled": before}
    _write_folder(out, model, student, written, curve)
    checkpoint.remove()
    return student


def _load(folder: Path) -> GPT2LMHeadModel:
    model = GPT2LMHeadModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32)
    return model.requires_grad_(False).eval()


def _write_folder(
    out: Path, base: Path, student: HierarchicalStudent, written: dict[str, Any], curve: Curve
) -> None:
    """The report comes last: a folder that has it is whole."""
    student.gpt2.save_pretrained(out)
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)
    write_tensors(out / MERGE_FILE, student.merge_tensors(), {"format": "pt"})
    contents = {
        **written,
        "trainable": TRAINABLE,
        "machine": describe_machine().model_dump(mode="json"),
        "versions": installed_versions().model_dump(mode="json"),
        **curve.model_dump(),
    }
    text = json.dumps(contents, indent=1) + "\n"
    atomic_write(out / REPORT_FILE, lambda partial: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distil_gpt2", description=__doc__)
    parser.add_argument("model", type=Path, help="folder of the base model, as small_gpt2 writes it")
    parser.add_argument("out", type=Path, help="folder of the result; a distillation goes on in it")
    parser.add_argument("--plot-layers", type=int, required=True, help="K: blocks that are looked up")
    parser.add_argument("--window", type=int, choices=(2, 3), default=3, help="tokens of an n-gram")
    parser.add_argument(
        "--text", type=Path, help="folder of train.jsonl and held_out.jsonl; default: the model's parent"
    )
    parser.add_argument("--steps", type=int, help=f"default {FULL_STEPS}")
    parser.add_argument("--batch", type=int, default=8, help="sequences in a step")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="at its highest")
    parser.add_argument("--dropped-share", type=float, default=1.0, help="of n-grams, at most")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--mixed-precision", choices=get_args(Precision), default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few steps: proves that it runs, nothing else")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Distils, or goes on with it."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parse(argv)
    text = options.text or options.model.parent
    recipe = Recipe(
        steps=options.steps or (QUICK_STEPS if options.quick else FULL_STEPS),
        batch=options.batch,
        learning_rate=options.learning_rate,
        weight_decay=0.0,
        seed=options.seed,
        mixed_precision=options.mixed_precision,
    )
    documents = read_documents(text / "train.jsonl"), read_documents(text / "held_out.jsonl")
    with progress_bar(f"distilling K = {options.plot_layers}") as report:
        distil_gpt2(
            options.model,
            options.out,
            documents,
            recipe,
            plot_layers=options.plot_layers,
            window=options.window,
            dropped_share=options.dropped_share,
            report=report,
            device=options.device,
            settings={"command": recorded_command("distil_gpt2", argv)},
        )
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
