"""A fine-tuned model of transformers', asked what it makes of texts: the teacher of a tenant."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmi_engine.construct.training_data import TaskData, first_inside
from hmi_engine.construct.training_memory import is_memory_error
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
_TEXTS_PER_CHUNK = 4096
_STAGE = "asking the teacher"


@dataclass(frozen=True)
class Teacher:
    """A model with its own tokenizer; it may have any architecture and size.

    Attributes:
        folder: where it came from.
        labels: in the order of its outputs.
        sha256: digest of its weights' files, in hex.
        model: of transformers.
        tokenizer: of transformers, a fast one.
        max_tokens: longer texts are cut, special tokens included; never more than it has positions.
    """

    folder: Path
    labels: tuple[str, ...]
    sha256: str
    model: Any
    tokenizer: Any
    max_tokens: int

    @classmethod
    def load(cls, folder: Path, task: Task, max_tokens: int) -> Teacher:
        """Loads a folder as ``save_pretrained`` writes it, with tokenizer and safetensors; nothing else.

        Raises:
            UnsupportedModelError: the folder holds no such model for the task, a damaged one, or no names of
                labels.
        """
        model, tokenizer = _loaded(folder, task)
        names = model.config.id2label
        if sorted(names) != list(range(len(names))):
            raise UnsupportedModelError(
                f"{folder}: config.json numbers its labels {', '.join(map(str, sorted(names))):.80}; number "
                "them from 0 in id2label, in the order of the model's outputs"
            )
        labels = tuple(str(names[number]) for number in range(len(names)))
        if labels == tuple(f"LABEL_{number}" for number in range(len(labels))):
            raise UnsupportedModelError(
                f"{folder}: config.json does not say what its {len(labels)} labels are; name them in id2label"
            )
        limit = min(max_tokens, tokenizer.model_max_length, _num_positions(model, max_tokens))
        return cls(folder, labels, _digest(folder), model.eval(), tokenizer, limit)

    @torch.inference_mode()
    def probabilities(
        self, data: TaskData, labels: Sequence[str], progress: TrainingProgress | None = None
    ) -> list[Tensor]:
        """What it says of each text: float32 [rows, len(labels)], one row, or one for each of its words.

        A label that the teacher does not know has probability 0. Of words in which none of its tokens begins
        it says nothing: zeros, as of words in which none of the student's does, and of texts without a token.

        Raises:
            UnsupportedModelError: the model fails.
        """
        columns = torch.tensor([labels.index(label) for label in self.labels])
        texts = data.encoded.texts
        said: list[Tensor] = [torch.empty(0)] * len(texts)
        has_padding = self.model.config.get_text_config().pad_token_id is not None
        texts_per_batch = _TEXTS_PER_BATCH if has_padding else 1  # transformers takes no more without it
        done = 0
        for numbers in _chunks(texts):
            tokens = self.tokenizer(
                [texts[number] for number in numbers], truncation=True, max_length=self.max_tokens
            )
            token_ids = tokens["input_ids"]
            for rows in _batches(token_ids, texts_per_batch):
                probabilities = self._run([token_ids[row] for row in rows])
                for found, row in zip(probabilities, rows, strict=True):
                    spread = torch.zeros(len(found), len(labels))
                    spread[:, columns] = found
                    if data.spans is not None:
                        spread = _of_words(spread, tokens.encodings[row], data, numbers[row])
                    said[numbers[row]] = spread
                done += len(rows)
                if progress is not None:
                    progress(_STAGE, done, len(texts), {})
        return said

    def _run(self, token_ids: list[list[int]]) -> Tensor:
        """Probabilities [texts, tokens, C], or [texts, 1, C] of whole texts, which have one length."""
        if not token_ids[0]:
            return torch.zeros(len(token_ids), 1, len(self.labels))
        ids = torch.tensor(token_ids)
        try:
            logits: Tensor = self.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            if is_memory_error(error):
                raise
            raise UnsupportedModelError(
                f"{self.folder}: the teacher fails on texts of {ids.shape[1]} tokens: {_reason(error)}; try "
                "them in transformers, or give a lower max_tokens"
            ) from error
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
            ignore_mismatched_sizes=True,  # told of below
        )
    except Exception as error:  # of damaged files transformers raises whatever meets them first
        if is_memory_error(error):
            raise
        raise UnsupportedModelError(
            f"{folder}: cannot be loaded as a teacher of {task}: {_reason(error)}; save it again by "
            "save_pretrained of model and tokenizer"
        ) from error
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise UnsupportedModelError(
            f"{folder}: {name} has the shape {list(found)}, and by config.json {list(expected)}; does "
            "id2label name as many labels as the model has outputs?"
        )
    if missing := sorted(loading["missing_keys"]):
        raise UnsupportedModelError(
            f"{folder}: is not fine-tuned for {task}: the checkpoint lacks {missing[0]}"
            + (f" and {len(missing) - 1} more weights" if len(missing) > 1 else "")
        )
    if not tokenizer.is_fast:
        raise UnsupportedModelError(f"{folder}: has no fast tokenizer; convert it with transformers")
    return model, tokenizer


def _reason(error: Exception) -> str:
    """What an error of transformers' says, in a line."""
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line:.200}" if line else type(error).__name__


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _num_positions(model: Any, otherwise: int) -> int:
    """How many tokens of a text have a position; ``otherwise`` where nothing limits them."""
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        if is_table and module.padding_idx is not None:  # RoBERTa and its kin count from behind it
            return int(module.num_embeddings - module.padding_idx - 1)
    positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else otherwise  # -1: XLNet's for no limit


def _chunks(texts: Sequence[str]) -> Iterator[list[int]]:
    """Numbers of the texts that are tokenized at a time, those of about one length together."""
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    for start in range(0, len(order), _TEXTS_PER_CHUNK):
        yield order[start : start + _TEXTS_PER_CHUNK]


def _batches(token_ids: Sequence[Sequence[int]], most: int) -> Iterator[list[int]]:
    """Numbers of the rows, at most so many of one length together: nothing is padded.

    What padding does differs between architectures: some find a text's end by the padding token's id, count
    positions from it, or want it in front.
    """
    by_length: dict[int, list[int]] = {}
    for row, ids in enumerate(token_ids):
        by_length.setdefault(len(ids), []).append(row)
    for rows in by_length.values():
        for start in range(0, len(rows), most):
            yield rows[start : start + most]


def _of_words(of_tokens: Tensor, encoding: Any, data: TaskData, number: int) -> Tensor:
    """Rows of the first tokens of the words of text ``number``; zeros where there is none."""
    assert data.spans is not None and data.words is not None
    text = data.encoded.texts[number]
    places, begins = [], []
    for place, is_special in enumerate(encoding.special_tokens_mask):
        begin = None if is_special else _begin_in_word(text, *encoding.offsets[place])
        if begin is not None:
            places.append(place)
            begins.append(begin)
    first = first_inside(data.spans[number], begins)
    rows = torch.zeros(len(first), of_tokens.shape[1])
    for word, (found, own) in enumerate(zip(first, data.words[number].tolist(), strict=True)):
        if found is not None and own:
            rows[word] = of_tokens[places[found]]
    return rows


def _begin_in_word(text: str, begin: int, end: int) -> int | None:
    """Where a token's characters begin, but for the space before a word, which many tokenizers count to it.

    A token of that space alone begins where the word does: for transformers (``word_ids``) it is the word's
    first, the one that a model learned the label at. None for other white space, which is of no word.
    """
    characters = text[begin:end]
    if characters.isspace() and characters != " ":
        return None
    return end - len(characters.lstrip())
