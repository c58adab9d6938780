"""What an importer finds in a folder, and what both importers do with it in the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop.adapter_folder import FolderFormat
from hmi_engine.knowledge.adapters import Adapter, Block, Site
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import (
    ClassificationHead,
    DenseLayer,
    EmbeddingHead,
    Head,
    RegressionHead,
    TokenClassificationHead,
)

__all__ = [
    "PROBLEM_TYPES",
    "BaseTensors",
    "ImportedTenant",
    "LowerLayers",
    "ProblemType",
    "base_tensor",
    "check_lower_layers",
    "default_labels",
    "finish_import",
    "sequence_head",
    "with_trained_pooler",
]

LowerLayers = Literal["error", "drop"]
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]

PROBLEM_TYPES: tuple[ProblemType, ...] = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
"""transformers' names of what a sequence classifier's numbers mean."""

BaseTensors = Callable[[], Mapping[str, torch.Tensor]]
"""Gives the base model's float32 weights by transformers' names, without a prefix, when they are needed."""


@dataclass(frozen=True)
class ImportedTenant:
    """What a folder held.

    Attributes:
        format: which library saved it.
        adapter: the blocks, checked against the base model.
        head: the head, or None where the folder has none.
        dropped: ``"layer 0, query"`` and so on: what ``lower_layers="drop"`` left out.
        warnings: what the importer ignored or assumed, one sentence each.
    """

    format: FolderFormat
    adapter: Adapter
    head: Head | None
    dropped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def check_lower_layers(lower_layers: str) -> None:
    """Raises ValueError unless it is ``"error"`` or ``"drop"``."""
    if lower_layers not in ("error", "drop"):
        raise ValueError(f"lower_layers is {lower_layers!r:.80}, must be 'error' or 'drop'")


def finish_import(
    folder_format: FolderFormat,
    blocks: Mapping[tuple[int, Site], Block],
    head: Head | None,
    general: GeneralInfo,
    lower_layers: LowerLayers,
    *,
    dropped: Sequence[str] = (),
    warnings: Sequence[str] = (),
) -> ImportedTenant:
    """Leaves out or refuses what lies below ``plot_layers``, and checks the rest against the base model.

    Raises:
        InvalidAdapterError, InvalidHeadError: what does not fit.
    """
    left_out = list(dropped)
    if lower_layers == "drop":
        below = sorted(place for place in blocks if place[0] < general.plot_layers)
        left_out += [f"layer {layer}, {site}" for layer, site in below]
        blocks = {place: block for place, block in blocks.items() if place not in below}
    adapter = Adapter(blocks)
    adapter.validate(general)
    if head is not None:
        head.validate(general)
    notes = list(warnings)
    if left_out:
        notes.append(
            f"{len(left_out)} blocks below plot_layers={general.plot_layers} were dropped; check the accuracy"
        )
    return ImportedTenant(folder_format, adapter, head, tuple(left_out), tuple(notes))


def default_labels(count: int) -> tuple[str, ...]:
    """``LABEL_0`` and so on, as transformers names classes."""
    return tuple(f"LABEL_{index}" for index in range(count))


def sequence_head(
    labels: tuple[str, ...],
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    pooling: Literal["pooler", "cls", "last"],
    problem_type: ProblemType | None,
    hidden: tuple[DenseLayer, ...] = (),
) -> ClassificationHead | RegressionHead:
    """The head of a sequence; with ``problem_type`` None one number is regression, as in both libraries.

    Raises:
        ValueError: an unknown ``problem_type``.
    """
    if problem_type is None:
        problem_type = "regression" if len(labels) == 1 else "single_label_classification"
    if problem_type not in PROBLEM_TYPES:
        raise ValueError(f"problem_type is {problem_type!r:.80}, must be one of {', '.join(PROBLEM_TYPES)}")
    if problem_type == "regression":
        return RegressionHead(labels, weight, bias, pooling, hidden)
    multi_label = problem_type == "multi_label_classification"
    return ClassificationHead(labels, weight, bias, pooling, multi_label, hidden)


def with_trained_pooler(head: Head, pooler: DenseLayer) -> Head:
    """The same head with a pooler of its own, as a first layer on the first token's hidden state.

    Raises:
        InvalidHeadError: an embedding head that has a projection already.
    """
    if isinstance(head, TokenClassificationHead) or head.pooling != "pooler":
        return head
    if isinstance(head, EmbeddingHead):
        if head.projection is not None:
            raise InvalidHeadError(
                "the folder's pooler was trained, and the given embedding head has a projection behind the "
                "pooler: HMI computes one layer of an embedding head; give a head without projection"
            )
        return EmbeddingHead("cls", head.normalize, pooler)
    return dataclasses.replace(head, pooling="cls", hidden=(pooler, *head.hidden))


def base_tensor(base: BaseTensors | None, name: str, why: str) -> torch.Tensor:
    """One of the base model's weights.

    Raises:
        InvalidAdapterError: there is none of this name, or ``base`` was not given.
    """
    tensors = base() if base is not None else {}
    if name not in tensors:
        raise InvalidAdapterError(
            f"{why} needs the base model's {name}, "
            + ("which it does not have" if base is not None else "import it into a store, or pass `base`")
        )
    return tensors[name]
