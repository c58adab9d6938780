"""A fine-tuned model of transformers', asked what it makes of texts: the teacher of a tenant."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hmi_engine.construct.training_data import TaskData, first_inside
from hmi_engine.construct.training_settings import TrainingProgress
from hmi_engine.errors import UnsupportedModelError
from hmi_engine.knowledge.examples import Task

__all__ = ["TEACHABLE_TASKS", "Teacher"]

_CLASSES: dict[Task, str] = {
    "classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
}
TEACHABLE_TASKS = tuple(_CLASSES)
"""Tasks whose answer is one of some labels, for each text or each word."""

_TEXTS_PER_BATCH = 64
_STAGE = "asking the teacher"


@dataclass(frozen=True)
class Teacher:
    """A model with its own tokenizer; it may have any architecture and size.

    Attributes:
        labels: in the order of its outputs.
        sha256: digest of its weights' files, in hex.
        model: of transformers.
        tokenizer: of transformers, a fast one.
        max_tokens: longer texts are cut.
    """

    labels: tuple[str, ...]
    sha256: str
    model: Any
    tokenizer: Any
    max_tokens: int

    @classmethod
    def load(cls, folder: Path, task: Task, max_tokens: int) -> Teacher:
        """Loads a folder as ``save_pretrained`` writes it, with tokenizer and safetensors; nothing else.

        Raises:
            UnsupportedModelError: the folder holds no such model for the task, or no names of labels.
        """
        model, tokenizer = _loaded(folder, task)
        names = model.config.id2label
        labels = tuple(str(names[number]) for number in range(len(names)))
        if labels == tuple(f"LABEL_{number}" for number in range(len(labels))):
            raise UnsupportedModelError(
                f"{folder}: config.json does not say what its {len(labels)} labels are; name them in id2label"
            )
        positions = getattr(model.config, "max_position_embeddings", max_tokens)
        return cls(labels, _digest(folder), model.eval(), tokenizer, min(max_tokens, positions))

    @torch.inference_mode()
    def probabilities(
        self, data: TaskData, labels: Sequence[str], progress: TrainingProgress | None = None
    ) -> list[Tensor]:
        """What it says of each text: float32 [rows, len(labels)], one row, or one for each of its words.

        A label that the teacher does not know has probability 0. Of words in which none of its tokens begins
        it says nothing: zeros, as of words in which none of the student's does.
        """
        columns = torch.tensor([labels.index(label) for label in self.labels])
        texts = data.encoded.texts
        said: list[Tensor] = [torch.empty(0)] * len(texts)
        done = 0
        for numbers in _batches(texts):
            tokens = self.tokenizer(
                [texts[number] for number in numbers],
                truncation=True,
                max_length=self.max_tokens,
                return_special_tokens_mask=True,
            )
            probabilities = self._run(tokens)
            for row, number in enumerate(numbers):
                found = probabilities[row, :1] if data.spans is None else probabilities[row]
                spread = torch.zeros(len(found), len(labels))
                spread[:, columns] = found
                if data.spans is not None:
                    spread = _of_words(spread, tokens.encodings[row], data, number)
                said[number] = spread
            done += len(numbers)
            if progress is not None:
                progress(_STAGE, done, len(texts), {})
        return said

    def _run(self, tokens: Any) -> Tensor:
        """Probabilities [texts, tokens, C], or [texts, 1, C] of whole texts."""
        ids = [torch.tensor(row) for row in tokens["input_ids"]]
        logits: Tensor = self.model(
            input_ids=pad_sequence(ids, batch_first=True),
            attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        ).logits
        probabilities = logits.softmax(-1)
        return probabilities if logits.dim() == 3 else probabilities.unsqueeze(1)


def _loaded(folder: Path, task: Task) -> tuple[Any, Any]:
    import transformers
    from transformers.utils import logging as transformers_logging

    if not folder.is_dir():
        raise UnsupportedModelError(f"{folder}: a teacher is a folder with a fine-tuned model; there is none")
    transformers_logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, use_fast=True, local_files_only=True)
        model, loading = getattr(transformers, _CLASSES[task]).from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedModelError(f"{folder}: cannot be loaded as a teacher of {task}: {reason}") from error
    if missing := sorted(loading["missing_keys"]):
        raise UnsupportedModelError(
            f"{folder}: is not fine-tuned for {task}: the checkpoint lacks {missing[0]}"
            + (f" and {len(missing) - 1} more weights" if len(missing) > 1 else "")
        )
    if not tokenizer.is_fast:
        raise UnsupportedModelError(f"{folder}: has no fast tokenizer; convert it with transformers")
    return model, tokenizer


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _batches(texts: Sequence[str]) -> Iterator[list[int]]:
    """Numbers of the texts, those of about one length together."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for start in range(0, len(order), _TEXTS_PER_BATCH):
        yield order[start : start + _TEXTS_PER_BATCH]


def _of_words(of_tokens: Tensor, encoding: Any, data: TaskData, number: int) -> Tensor:
    """Rows of the first tokens inside the words of text ``number``; zeros where there is none."""
    assert data.spans is not None and data.words is not None
    special = encoding.special_tokens_mask
    inside = [place for place, is_special in enumerate(special) if not is_special]
    first = first_inside(data.spans[number], [encoding.offsets[place][0] for place in inside])
    rows = torch.zeros(len(first), of_tokens.shape[1])
    for word, (found, own) in enumerate(zip(first, data.words[number].tolist(), strict=True)):
        if found is not None and own:
            rows[word] = of_tokens[inside[found]]
    return rows
