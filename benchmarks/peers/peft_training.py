"""One tenant trained as PEFT's documentation trains one: a transformers model, a data loader, AdamW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from hmi_engine.construct.training_data import stratified_split
from hmi_engine.construct.training_loop import MAX_GRADIENT_NORM
from hmi_engine.construct.training_schedule import Schedule
from hmi_engine.construct.training_settings import TrainingSettings
from hmi_engine.knowledge.examples import Example

__all__ = ["PeftTrainer"]

TEXTS_PER_PREDICTION = 64


@dataclass(frozen=True)
class PeftTrainer:
    """Trains LoRA on query and value, pooler and classifier, with padding to the longest text of a batch.

    Attributes:
        model: folder of the base.
        layers: those that get LoRA; None for all of them.
        settings: rank, scale, learning rate, epochs, batch size and the like, as HMI takes them.
    """

    model: Path
    layers: tuple[int, ...] | None
    settings: TrainingSettings

    def train(self, examples: Sequence[Example], test_examples: Sequence[Example]) -> list[bool]:
        """Trains, keeps the best epoch by the validation split, and says which test texts it gets right.

        The best epoch has most texts right, and the least loss among those, as in HMI.
        """
        from transformers import get_linear_schedule_with_warmup

        settings = self.settings
        labels = sorted({example.label for example in examples})
        encoded = [self._encode(part, labels) for part in (examples, test_examples)]
        generator = torch.Generator().manual_seed(settings.seed)
        split = stratified_split(
            [row["labels"] for row in encoded[0]], len(labels), settings.validation_fraction, generator
        )
        training, validation = (
            [encoded[0][number] for number in part] for part in (split.training, split.validation)
        )
        torch.manual_seed(settings.seed)
        model = self._new_model(len(labels))
        schedule = Schedule.of(settings, len(training))
        loader = self._loader(training, schedule.batch_size, generator)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=settings.peak_learning_rate, weight_decay=settings.weight_decay
        )
        steps = schedule.max_epochs * len(loader)
        rates = get_linear_schedule_with_warmup(
            optimizer, max(1, round(steps * settings.warmup_fraction)), steps
        )
        best: dict[str, Tensor] = {}
        best_rank = (-1, 0.0)
        for _ in range(schedule.max_epochs):
            model.train()
            for batch in loader:
                with torch.enable_grad():
                    loss = model(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
                optimizer.step()
                rates.step()
            right, validation_loss = self._judge(model, validation)
            rank = sum(right), -validation_loss
            if rank > best_rank:
                best_rank = rank
                best = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        model.load_state_dict(best, strict=False)
        return self._judge(model, encoded[1])[0]

    def _new_model(self, num_labels: int) -> Any:
        from peft import LoraConfig, TaskType, get_peft_model
        from transformers import BertForSequenceClassification

        base = BertForSequenceClassification.from_pretrained(self.model, num_labels=num_labels)
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=self.settings.rank,
            lora_alpha=self.settings.rank * self.settings.block_scale,
            target_modules=["query", "value"],
            layers_to_transform=None if self.layers is None else list(self.layers),
            modules_to_save=["classifier", "pooler"],
        )
        return get_peft_model(base, config)

    def _encode(self, examples: Sequence[Example], labels: Sequence[str]) -> list[dict[str, Any]]:
        ids = self._tokenizer()(
            [example.text for example in examples], truncation=True, max_length=self.settings.max_tokens
        )["input_ids"]
        return [
            {"input_ids": row, "labels": labels.index(example.label)}
            for row, example in zip(ids, examples, strict=True)
        ]

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model)

    def _loader(
        self, rows: list[dict[str, Any]], batch_size: int, generator: torch.Generator | None = None
    ) -> Any:
        from transformers import DataCollatorWithPadding

        return DataLoader(
            rows,  # type: ignore[arg-type]
            batch_size=batch_size,
            shuffle=generator is not None,
            generator=generator,
            collate_fn=DataCollatorWithPadding(self._tokenizer()),
        )

    @torch.no_grad()
    def _judge(self, model: Any, rows: list[dict[str, Any]]) -> tuple[list[bool], float]:
        """Which rows the model gets right, and its mean loss over all of them."""
        model.eval()
        right: list[bool] = []
        loss = 0.0
        for batch in self._loader(rows, TEXTS_PER_PREDICTION):
            logits = model(**batch).logits
            right += (logits.argmax(-1) == batch["labels"]).tolist()
            loss += float(functional.cross_entropy(logits, batch["labels"], reduction="sum"))
        return right, loss / len(rows)
