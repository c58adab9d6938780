"""Records what the `adapters` library itself computes: folders that it saved, and outputs on fixed inputs.

Runs in an environment of its own (see ``make.py``), as `adapters` wants an older transformers than HMI has:

    python record.py OUT

writes ``OUT/base`` (a small random BERT and its tokenizer), ``OUT/<case>`` (adapter and head as safetensors),
``OUT/inputs.json`` and ``OUT/expected.safetensors`` (logits as ``<case>.k<K>.<number of the input>``), and
``OUT/versions.json``.

For K > 0 the upper layers of the adapted model run on the input of layer K that the reference of the tests
(``tests/reference_hbert.py``) makes of the plain model.
"""

import json
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import (
    AdapterConfig,
    BertAdapterModel,
    BnConfig,
    ConfigUnion,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    ParBnConfig,
    SeqBnConfig,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[2]))
from reference_hbert import merged

PLOT_LAYERS = 2
NUM_INPUTS = 6
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [f"{first}{second}" for first in "abcdefg" for second in "klmnopq"]


@dataclass(frozen=True)
class Case:
    """An adapter and a head; ``static`` is one of transformers' own models with the library's blocks."""

    config: AdapterConfig
    head: dict[str, Any] = field(default_factory=dict)
    head_type: str = "classification"
    static: bool = False


CASES = {
    "seq_bn": Case(SeqBnConfig(reduction_factor=4), {"num_labels": 3}),
    "seq_bn_upper": Case(
        SeqBnConfig(reduction_factor=8, leave_out=[0, 1], non_linearity="tanh"),
        {"num_labels": 3, "layers": 1, "use_pooler": True, "id2label": {0: "no", 1: "yes", 2: "maybe"}},
    ),
    "seq_bn_reductions": Case(
        SeqBnConfig(
            reduction_factor={"1": 2, "3": 20, "default": 3.5},
            leave_out=[2],
            non_linearity="gelu",
            scaling="learned",
        ),
        {"num_labels": 5},
        "tagging",
    ),
    "seq_bn_channel": Case(
        SeqBnConfig(reduction_factor=16, non_linearity="gelu_new", scaling="channel"),
        {"num_labels": 1, "layers": 2, "use_pooler": True},
    ),
    "double_seq_bn": Case(
        DoubleSeqBnConfig(reduction_factor=8),
        {"num_labels": 4, "layers": 3, "activation_function": "relu"},
    ),
    "after_ffn": Case(
        BnConfig(
            mh_adapter=False,
            output_adapter=True,
            reduction_factor=8,
            non_linearity="silu",
            residual_before_ln=False,
            scaling=0.5,
        ),
        {"num_labels": 2, "layers": 2, "activation_function": None},
    ),
    "par_bn": Case(
        ParBnConfig(reduction_factor=4),
        {"num_labels": 3, "layers": 2, "activation_function": "gelu"},
        "multilabel_classification",
    ),
    "lora": Case(
        LoRAConfig(r=4, alpha=6, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True),
        {"num_labels": 3, "layers": 2},
        "tagging",
    ),
    "ia3": Case(IA3Config(output_lora=True, alpha=2), {"num_labels": 3, "bias": False}),
    "union": Case(
        ConfigUnion(ParBnConfig(reduction_factor=8), LoRAConfig(r=2, alpha=3)),
        {"num_labels": 2, "use_pooler": True},
    ),
    "static_head": Case(LoRAConfig(r=3, alpha=3), {"num_labels": 3}, static=True),
}


def write_base(folder: Path) -> None:
    """A random BERT of 4 layers of width 32 with a word-level tokenizer; weights large enough to matter."""
    tokens = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True))
    ).save_pretrained(folder)
    torch.manual_seed(11)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    model = BertModel(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(name.endswith("LayerNorm.weight")), std=0.15)
    model.save_pretrained(folder, safe_serialization=True)


def random_inputs() -> list[list[int]]:
    """Token ids of texts of different lengths, special tokens included."""
    generator = torch.Generator().manual_seed(12)
    first, last = len(SPECIAL), len(SPECIAL) + len(WORDS)
    return [
        [2, *torch.randint(first, last, (length,), generator=generator).tolist(), 3]
        for length in (1, 3, 5, 8, 11, 14)[:NUM_INPUTS]
    ]


def make_model(base: Path, name: str, case: Case, seed: int) -> Any:
    """The model with the case's adapter and head, both random and active."""
    if case.static:
        model = BertForSequenceClassification.from_pretrained(base, num_labels=case.head["num_labels"])
        adapters.init(model)
        model.add_adapter(name, config=case.config)
    else:
        model = BertAdapterModel.from_pretrained(base)
        model.add_adapter(name, config=case.config)
        model.add_prediction_head(make_head(model, name, case))
    model.set_active_adapters(name)
    torch.manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if is_own(parameter_name, name, case):
            is_scale = "loras" in parameter_name and "lora_A" not in parameter_name and is_ia3(case.config)
            is_scale = is_scale or parameter_name.endswith(".scaling")
            torch.nn.init.normal_(parameter, mean=float(is_scale), std=0.3)
    return model.eval()


def make_head(model: Any, name: str, case: Case) -> Any:
    """The library's head of a case."""
    classes = {
        "classification": adapters.heads.ClassificationHead,
        "multilabel_classification": adapters.heads.MultiLabelClassificationHead,
        "tagging": adapters.heads.TaggingHead,
    }
    return classes[case.head_type](model, name, **case.head)


def is_ia3(config: AdapterConfig) -> bool:
    """Whether a config scales instead of adding."""
    return isinstance(config, LoRAConfig) and config.composition_mode == "scale"


def is_own(parameter_name: str, name: str, case: Case) -> bool:
    """Whether a parameter belongs to the adapter or the head."""
    own_head = parameter_name.startswith("classifier." if case.static else f"heads.{name}.")
    return own_head or f".adapters.{name}." in parameter_name or f".loras.{name}." in parameter_name


def save(model: Any, folder: Path, name: str, case: Case) -> None:
    """Adapter and head in one folder, as ``save_adapter(with_head=True)`` does it."""
    model.save_adapter(str(folder), name, with_head=not case.static, use_safetensors=True)
    if case.static:
        model.save_head(str(folder), use_safetensors=True)


def logits_of(model: Any, plain: BertModel, ids: list[int], plot_layers: int, case: Case) -> torch.Tensor:
    """The library's logits: for K = 0 of the whole model, else of the upper layers on the merged input."""
    if plot_layers == 0:
        return model(input_ids=torch.tensor([ids])).logits[0]
    hidden = merged(plain, ids, plot_layers, 2)[None]
    for layer in model.bert.encoder.layer[plot_layers:]:
        hidden = layer(hidden, None)[0]
    pooled = model.bert.pooler(hidden)
    if case.static:
        return model.classifier(pooled)[0]
    return model.heads[model.active_head]((hidden,), pooled_output=pooled)[0][0]


@torch.no_grad()
def main(out: Path) -> None:
    """Writes everything."""
    transformers.logging.set_verbosity_error()
    logging.getLogger("adapters").setLevel(logging.ERROR)  # it warns before adapters are activated
    os.chdir(out)  # the files name the base model by the path that it was loaded from
    base = Path("base")
    write_base(base)
    plain = BertModel.from_pretrained(base).eval()
    inputs = random_inputs()
    Path("inputs.json").write_text(json.dumps({"plot_layers": PLOT_LAYERS, "input_ids": inputs}) + "\n")
    expected = {}
    for seed, (name, case) in enumerate(CASES.items(), start=21):
        model = make_model(base, name, case, seed)
        save(model, Path(name), name, case)
        for plot_layers in (0, PLOT_LAYERS):
            for number, ids in enumerate(inputs):
                logits = logits_of(model, plain, ids, plot_layers, case)
                expected[f"{name}.k{plot_layers}.{number}"] = logits.contiguous()
    save_file(expected, "expected.safetensors")
    versions = {
        "adapters": adapters.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    Path("versions.json").write_text(json.dumps(versions) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
