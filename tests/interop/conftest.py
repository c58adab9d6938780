"""A random BERT in memory, and folders that PEFT itself saved from it."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel

from hmi_engine.knowledge.general import GeneralInfo

NUM_LABELS = 3
BERT_CLASSES = {
    "SEQ_CLS": BertForSequenceClassification,
    "TOKEN_CLS": BertForTokenClassification,
    "FEATURE_EXTRACTION": BertModel,
}


@pytest.fixture
def make_general() -> Callable[[int], GeneralInfo]:
    """GeneralInfo of the fixture's BERT for a number of domain layers."""

    def make(plot_layers: int = 0) -> GeneralInfo:
        return GeneralInfo(
            family="bert",
            source="tests/tiny",
            num_layers=3,
            hidden_size=32,
            num_heads=4,
            intermediate_size=48,
            placeholder_token_id=4,
            vocab_size=60,
            max_positions=40,
            plot_layers=plot_layers,
            window=2,
            row_dtype="float32",
            tokenizer_sha256="0" * 64,
            domain_layers="inherited",
        )

    return make


@pytest.fixture
def make_base() -> Callable[[str], Any]:
    """A random transformers model for a PEFT task type, always with the same weights."""

    def make(task_type: str) -> Any:
        config = BertConfig(
            vocab_size=60,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=40,
            num_labels=NUM_LABELS,
        )
        torch.manual_seed(5)
        return BERT_CLASSES[task_type](config).eval()

    return make


@pytest.fixture
def save_lora(tmp_path: Path, make_base: Callable[[str], Any]) -> Callable[..., tuple[PeftModel, Path]]:
    """Makes a PEFT model with random weights and saves it: returns it and its folder."""

    def save(
        task_type: str = "SEQ_CLS", config_class: type[PeftConfig] = LoraConfig, **settings: Any
    ) -> tuple[PeftModel, Path]:
        if config_class is LoraConfig:
            settings = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"], **settings}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(make_base(task_type), config_class(task_type=task_type, **settings))
            torch.manual_seed(9)
            for name, parameter in model.named_parameters():
                if "lora_" in name or "ia3_" in name or "classifier" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            folder = tmp_path / f"peft-{task_type}"
            model.save_pretrained(str(folder))
        return model.eval(), folder

    return save
