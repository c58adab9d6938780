"""A tiny random BERT with LoRA tenants, written by transformers and PEFT themselves."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from hmi_engine.demo.peers import ServedTenant

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "mu", "nu"]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of four layers and its tokenizer, in transformers' format."""
    folder = tmp_path_factory.mktemp("base")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.4,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(
        WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    return folder


def write_peft_tenant(
    base: Path, folder: Path, *, name: str, labels: Sequence[str], seed: int
) -> ServedTenant:
    """A tenant with large random LoRA on query and value of the upper two layers, saved by PEFT."""
    torch.manual_seed(seed)
    model = BertForSequenceClassification.from_pretrained(base, num_labels=len(labels))
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=4,
        lora_alpha=8,
        target_modules=["query", "value"],
        layers_to_transform=[2, 3],
        modules_to_save=["classifier"],
        init_lora_weights=False,
    )
    adapted = get_peft_model(model, lora)
    for parameter_name, parameter in adapted.named_parameters():
        if "lora_" in parameter_name or "modules_to_save" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(folder)
    return ServedTenant(name, folder, tuple(labels))


@pytest.fixture(scope="session")
def peft_tenants(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[ServedTenant]:
    """Three tenants with two, three and two labels."""
    label_sets = {"a/one": ("no", "yes"), "a/two": ("x", "y", "z"), "b.three": ("false", "true")}
    return [
        write_peft_tenant(base_folder, tmp_path_factory.mktemp("peft"), name=name, labels=labels, seed=seed)
        for seed, (name, labels) in enumerate(label_sets.items())
    ]
