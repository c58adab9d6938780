"""A random BERT and a random GPT-2 in memory, and folders that PEFT itself saved from them."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from hmi_engine.knowledge.general import GeneralInfo

NUM_LABELS = 3
BERT_CLASSES = {
    "SEQ_CLS": BertForSequenceClassification,
    "TOKEN_CLS": BertForTokenClassification,
    "FEATURE_EXTRACTION": BertModel,
}
GPT2_CLASSES = {
    "CAUSAL_LM": GPT2LMHeadModel,
    "SEQ_CLS": GPT2ForSequenceClassification,
    "TOKEN_CLS": GPT2ForTokenClassification,
    "FEATURE_EXTRACTION": GPT2Model,
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


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> GPT2LMHeadModel:
    """The random GPT-2 of the tests."""
    return GPT2LMHeadModel.from_pretrained(tiny_gpt2).eval()


@pytest.fixture(scope="module")
def gpt2_tensors(gpt2: GPT2LMHeadModel) -> Callable[[], dict[str, torch.Tensor]]:
    """Gives its weights, as ``read_peft`` takes them."""
    return gpt2.transformer.state_dict


@pytest.fixture(scope="module")
def make_gpt2_general(gpt2: GPT2LMHeadModel) -> Callable[[int], GeneralInfo]:
    """GeneralInfo of it for a number of domain layers."""

    def make(plot_layers: int = 0) -> GeneralInfo:
        return GeneralInfo(
            family="gpt2",
            source="tests/tiny",
            num_layers=4,
            hidden_size=32,
            num_heads=4,
            intermediate_size=128,
            placeholder_token_id=None,
            vocab_size=gpt2.config.vocab_size,
            max_positions=96,
            plot_layers=plot_layers,
            window=3,
            row_dtype="float32",
            tokenizer_sha256="0" * 64,
            domain_layers="inherited",
        )

    return make


def _gpt2_for(gpt2: GPT2LMHeadModel, task_type: str) -> Any:
    """A model for a PEFT task type, with the same weights."""
    config = copy.deepcopy(gpt2.config)
    config.pad_token_id, config.num_labels = 0, NUM_LABELS
    model = GPT2_CLASSES[task_type](config)
    getattr(model, "transformer", model).load_state_dict(gpt2.transformer.state_dict())
    return model


def _is_trained(name: str, bias: str) -> bool:
    """Whether an adapter trains a parameter."""
    trained = ("lora_", "ia3_", "score", "classifier")
    return any(part in name for part in trained) or (bias != "none" and name.endswith(".bias"))


@pytest.fixture(scope="module")
def save_gpt2(
    gpt2: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[PeftModel, Path]]:
    """As ``save_lora``, of the GPT-2; ``touch`` may change the model before it is saved."""

    def save(
        task_type: str = "CAUSAL_LM",
        kind: type[PeftConfig] = LoraConfig,
        *,
        touch: Callable[[PeftModel], None] | None = None,
        **config: Any,
    ) -> tuple[PeftModel, Path]:
        if kind is LoraConfig:
            config = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": True} | config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(_gpt2_for(gpt2, task_type), kind(task_type=task_type, **config))
            torch.manual_seed(9)
            for name, parameter in model.named_parameters():
                if _is_trained(name, config.get("bias", "none")) and parameter.requires_grad:
                    mean = 1.0 if "ia3_" in name else parameter.detach() if name.endswith(".bias") else 0.0
                    parameter.data = torch.randn_like(parameter) * 0.3 + mean
            if touch is not None:
                touch(model)
            folder = tmp_path_factory.mktemp("peft")
            model.save_pretrained(str(folder))
        return model.eval(), folder

    return save


@pytest.fixture(scope="module")
def load_gpt2(gpt2: GPT2LMHeadModel) -> Callable[..., PeftModel]:
    """Lets PEFT load a folder. Patterns that overlap have another order there: PEFT writes them sorted."""

    def load(folder: Path, task_type: str = "CAUSAL_LM") -> PeftModel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return PeftModel.from_pretrained(_gpt2_for(gpt2, task_type), str(folder)).eval()

    return load
