"""Adapters made by PEFT and by AdapterHub's library, and how far the engine's answers are from theirs."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel

import hmi_engine as hmi
from hmi_engine.interop import ProblemType

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))  # the mathematics written once more, from transformers' modules
from reference_hbert import merged  # noqa: E402

__all__ = [
    "PEFT_CASES",
    "RECORDED",
    "Errors",
    "PeftCase",
    "Reference",
    "largest_errors",
    "peft_references",
    "recorded_references",
]

RECORDED = ROOT / "tests" / "interop" / "adapterhub_reference" / "recorded"
"""What ``make.py`` beside it recorded with the `adapters` library."""

LINEARS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
Logits = Callable[[Sequence[int]], torch.Tensor]


@dataclass(frozen=True)
class PeftCase:
    """A kind of adapter and head as PEFT makes it; ``problem_type`` is what PEFT does not keep."""

    config: Callable[..., PeftConfig]
    settings: Mapping[str, Any]
    task_type: Literal["SEQ_CLS", "TOKEN_CLS"] = "SEQ_CLS"
    num_labels: int = 3
    problem_type: ProblemType | None = None


PEFT_CASES = {
    "LoRA": PeftCase(LoraConfig, {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]}),
    "LoRA, rank-stabilized, on all six linear layers": PeftCase(
        LoraConfig, {"r": 7, "lora_alpha": 3, "target_modules": LINEARS, "use_rslora": True}
    ),
    "LoRA, ranks and alphas by module": PeftCase(
        LoraConfig,
        {
            "r": 2,
            "lora_alpha": 2,
            "target_modules": LINEARS,
            "rank_pattern": {"query": 5, r"layer\.(1|3)\.output\.dense": 9},
            "alpha_pattern": {"value": 7},
        },
    ),
    "LoRA, multi-label": PeftCase(
        LoraConfig, {"target_modules": ["key"]}, problem_type="multi_label_classification"
    ),
    "LoRA, token classification": PeftCase(LoraConfig, {"target_modules": LINEARS}, "TOKEN_CLS", 5),
    "LoRA, regression": PeftCase(LoraConfig, {"target_modules": ["query", "output.dense"]}, num_labels=1),
    "LoRA with a bias inside (lora_bias)": PeftCase(
        LoraConfig, {"r": 3, "target_modules": LINEARS, "lora_bias": True}
    ),
    "LoRA and biases of its modules (lora_only)": PeftCase(
        LoraConfig, {"r": 3, "target_modules": ["query", "intermediate.dense"], "bias": "lora_only"}
    ),
    "LoRA with biases and trained ones": PeftCase(
        LoraConfig, {"r": 3, "target_modules": ["value"], "bias": "lora_only", "lora_bias": True}
    ),
    "LoRA and all biases": PeftCase(LoraConfig, {"r": 3, "target_modules": ["value"], "bias": "all"}),
    "LoRA on all linear layers and the pooler": PeftCase(
        LoraConfig, {"r": 3, "target_modules": "all-linear"}
    ),
    "LoRA and a pooler trained whole": PeftCase(
        LoraConfig, {"target_modules": ["query"], "modules_to_save": ["pooler"]}
    ),
    "IA3": PeftCase(
        IA3Config,
        {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "IA3, outputs of all six linear layers": PeftCase(
        IA3Config, {"target_modules": LINEARS, "feedforward_modules": []}
    ),
    "IA3, token classification": PeftCase(
        IA3Config,
        {"target_modules": ["key", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"]},
        "TOKEN_CLS",
    ),
}
"""Every kind, setting and head of PEFT that docs/adapters.md names."""


@dataclass(frozen=True)
class Reference:
    """One adapter in a folder, and what its own library computes: for each K and each input, logits.

    ``logits[K][i]`` is [C], or [n, C] of a token classifier.
    """

    folder: Path
    input_ids: Sequence[Sequence[int]]
    logits: Mapping[int, Sequence[torch.Tensor]]
    problem_type: ProblemType | None = None


@torch.no_grad()
def peft_references(
    base: Path, out: Path, input_ids: Sequence[Sequence[int]], plot_layers: int
) -> Iterator[tuple[str, Reference]]:
    """Makes every PEFT case on a base model with random weights, saves it below ``out``, and computes.

    With K > 0 the adapter's upper layers run on the input of layer K that the plain base gives.
    """
    plain = BertModel.from_pretrained(base).eval()
    for number, (name, case) in enumerate(PEFT_CASES.items()):
        model = _random_model(base, case, seed=number)
        folder = out / str(number)
        model.save_pretrained(str(folder))
        logits = {
            depth: [_logits(model, plain, ids, depth, case) for ids in input_ids]
            for depth in (0, plot_layers)
        }
        yield name, Reference(folder, input_ids, logits, case.problem_type)


def _random_model(base: Path, case: PeftCase, seed: int) -> PeftModel:
    classes = {"SEQ_CLS": BertForSequenceClassification, "TOKEN_CLS": BertForTokenClassification}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of biases
        torch.manual_seed(seed)
        plain = classes[case.task_type].from_pretrained(base, num_labels=case.num_labels)
        model = get_peft_model(plain, case.config(task_type=case.task_type, **case.settings))
    size = plain.config.hidden_size
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "embeddings" in name:
            continue  # an embedding's bias has no place in HMI
        if "ia3_l" in name:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        elif "lora_" in name or "classifier" in name:
            torch.nn.init.normal_(parameter, std=(32 / size) ** 0.5 * 0.3)
        else:  # biases and poolers: something else than the base's, but not wild
            parameter.data += torch.randn(parameter.shape) * (32 / size) ** 0.5 * 0.1
    return model.eval()


def _logits(
    model: PeftModel, plain: BertModel, ids: Sequence[int], plot_layers: int, case: PeftCase
) -> torch.Tensor:
    if plot_layers == 0:
        return model(input_ids=torch.tensor([list(ids)])).logits[0]
    adapted = model.base_model.model
    hidden = merged(plain, list(ids), plot_layers, 2)[None]
    for layer in adapted.bert.encoder.layer[plot_layers:]:
        output = layer(hidden)
        hidden = output[0] if isinstance(output, tuple) else output
    if case.task_type == "TOKEN_CLS":
        return adapted.classifier(hidden)[0]
    return adapted.classifier(adapted.bert.pooler(hidden))[0]


def recorded_references(recorded: Path = RECORDED) -> Iterator[tuple[str, Reference]]:
    """Reads what the `adapters` library computed when ``make.py`` ran."""
    inputs = json.loads((recorded / "inputs.json").read_text())
    expected = load_file(recorded / "expected.safetensors")
    count = len(inputs["input_ids"])
    for name in sorted({key.partition(".")[0] for key in expected}):
        logits = {
            depth: [expected[f"{name}.k{depth}.{number}"] for number in range(count)]
            for depth in (0, inputs["plot_layers"])
        }
        yield name, Reference(recorded / name, inputs["input_ids"], logits)


@dataclass(frozen=True)
class Errors:
    """The largest absolute difference of a probability, or of a regression's number.

    ``without_adapter`` is that of the same head without the adapter: what an import that does nothing has.
    """

    error: float = 0.0
    without_adapter: float = 0.0


def largest_errors(
    base: Path, out: Path, references: Mapping[str, Reference], plot_layers: int
) -> dict[str, Errors]:
    """The errors of each reference's answers.

    All adapters are tenants of one store, and all requests of all of them run in one call.
    """
    requests, logits = [], []
    found: dict[Any, float] = {}
    with (
        hmi.Store.create(out, general=base, plot_layers=plot_layers, row_dtype="float32") as store,
        hmi.Engine(store, miss="exact") as engine,
    ):
        for name, reference in references.items():
            tenant = f"t{len(store.tenants)}"
            store.import_adapter(
                reference.folder,
                tenant=tenant,
                problem_type=reference.problem_type,
                lower_layers="drop" if plot_layers else "error",
            )
            head = store.load_tenant(tenant)[1]
            store.add_tenant(f"{tenant}-plain", domain="general", adapter=hmi.Adapter({}), head=head)
            for served in (tenant, f"{tenant}-plain"):
                key = (name, served == tenant)
                requests += [hmi.Request(served, input_ids=ids, id=key) for ids in reference.input_ids]
                logits += reference.logits[plot_layers]
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(0)).tolist()
        for index, response in zip(order, engine.run([requests[i] for i in order]), strict=True):
            head = store.load_tenant(response.tenant)[1]
            error = _error(
                response, logits[index], isinstance(head, hmi.ClassificationHead) and head.multi_label
            )
            found[response.id] = max(found.get(response.id, 0.0), error)
    return {name: Errors(found[name, True], found[name, False]) for name in references}


def _error(response: hmi.Response, logits: torch.Tensor, multi_label: bool) -> float:
    if response.error is not None:
        raise response.error
    if response.kind == "token_classification":
        expected = logits.softmax(-1)
        best = [f"LABEL_{index}" for index in expected.argmax(-1).tolist()]
        if [tag.label for tag in response.tags] != best:
            return 1.0
        found = torch.tensor([tag.score for tag in response.tags])
        return float((found - expected.max(-1).values).abs().max())
    found = torch.tensor(list(response.scores.values()))
    if response.kind == "regression":
        return float((found - logits).abs().max())
    return float((found - (logits.sigmoid() if multi_label else logits.softmax(-1))).abs().max())
