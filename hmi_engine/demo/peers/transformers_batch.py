"""What the transformers-based peers share: padded batches, reading out, the search for their best setting."""

from __future__ import annotations

import logging
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification
from transformers.utils import logging as transformers_logging

from hmi_engine.demo.peers.interface import ServedTenant
from hmi_engine.errors import InvalidHeadError, MissingDependencyError
from hmi_engine.models.tokenization import TextEncoder
from hmi_engine.request import Request, Response, Usage

__all__ = ["TransformersPeer", "load_base", "require_peft", "tune", "with_equal_heads"]

PADDED_LABEL_BIAS = -1e9
ADAPTER_FILE = "adapter_model.safetensors"


class TransformersPeer(ABC):
    """A peer that computes rectangular batches, each padded to its longest text.

    ``max_sequences`` limits one forward pass: sorting by length and computing fewer texts at once trades
    padding against the speed of larger products. :func:`tune` picks the fastest for each peer.
    """

    name: str
    description: str

    def __init__(
        self,
        base: Path,
        encoder: TextEncoder,
        *,
        max_sequences: int = 32,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """``base`` is a transformers folder of the base, ``encoder`` the tokenizer, the same for all."""
        self.max_sequences = max_sequences
        self._device = device
        self._dtype = dtype
        self._base = base
        self._encoder = encoder
        self._labels: dict[str, tuple[str, ...]] = {}

    def prepare(self, tenants: Sequence[ServedTenant]) -> None:
        """Loads the base model and every tenant."""
        self._labels = {tenant.name: tenant.labels for tenant in tenants}
        with quiet_loading():
            self._load(tenants)

    @torch.inference_mode()
    def run(self, requests: Sequence[Request]) -> list[Response]:
        """Answers one batch, from text to probabilities."""
        token_ids = self._encoder.token_ids([request.text or "" for request in requests])
        responses: list[Response | None] = [None] * len(requests)
        for group in self._groups(requests):
            group.sort(key=lambda index: len(token_ids[index]))
            for start in range(0, len(group), self.max_sequences):
                members = group[start : start + self.max_sequences]
                input_ids, mask = _pad([token_ids[index] for index in members], self._device)
                logits = self._logits([requests[index].tenant for index in members], input_ids, mask)
                for index, row in zip(members, logits.float().softmax(dim=-1).tolist(), strict=True):
                    responses[index] = self._respond(requests[index], row, len(token_ids[index]))
        return [response for response in responses if response is not None]

    @abstractmethod
    def close(self) -> None:
        """Gives memory back."""

    @abstractmethod
    def _load(self, tenants: Sequence[ServedTenant]) -> None: ...

    @abstractmethod
    def _groups(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        """Indexes of requests that may share a forward pass."""

    @abstractmethod
    def _logits(
        self, tenants: Sequence[str], input_ids: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """input_ids, mask int64 [B, L] -> [B, C]; the mask is None where nothing is padded."""

    def _respond(self, request: Request, probabilities: list[float], num_tokens: int) -> Response:
        scores = dict(zip(self._labels[request.tenant], probabilities, strict=False))
        label = max(scores, key=scores.__getitem__)
        return Response(
            request.tenant, "classification", label, scores, usage=Usage(num_tokens), id=request.id
        )


def by_tenant(requests: Sequence[Request]) -> Iterator[list[int]]:
    """Indexes of the requests of each tenant."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.tenant, []).append(index)
    yield from groups.values()


def _pad(sequences: list[list[int]], device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor | None]:
    longest = max(map(len, sequences))
    input_ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in sequences]).to(device)
    if all(len(ids) == longest for ids in sequences):
        return input_ids, None
    lengths = torch.tensor([len(ids) for ids in sequences])
    return input_ids, (torch.arange(longest) < lengths[:, None]).long().to(device)


def tune(
    peer: TransformersPeer, requests: Sequence[Request], *, candidates: Sequence[int] = (32, 16, 8, 4, 1)
) -> dict[int, float]:
    """Gives a prepared peer its fastest ``max_sequences`` for a batch like ``requests``.

    Returns:
        Seconds by candidate, the better of two runs each.
    """
    seconds = {}
    for candidate in candidates:
        peer.max_sequences = candidate
        peer.run(requests)
        seconds[candidate] = min(_seconds(peer, requests) for _ in range(2))
    peer.max_sequences = min(seconds, key=seconds.__getitem__)
    return seconds


def _seconds(peer: TransformersPeer, requests: Sequence[Request]) -> float:
    started = time.perf_counter()
    peer.run(requests)
    return time.perf_counter() - started


class _FirstToken(torch.nn.Module):
    """Stands in BERT's pooler's place where heads read the first token as it is."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states[:, 0]


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keeps transformers and PEFT from telling what is of no use to a person who compares.

    The warning that the classifier is untrained would be wrong (each tenant brings its own), and deprecations
    inside their own code are theirs.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_base(base: Path, num_labels: int, pooling: str) -> BertForSequenceClassification:
    """The base model with an untrained classifier of ``num_labels`` rows, for inference."""
    model: BertForSequenceClassification = BertForSequenceClassification.from_pretrained(
        base, num_labels=num_labels, dtype=torch.float32
    )
    if pooling == "cls":
        setattr(model.bert, "pooler", _FirstToken())  # noqa: B010  (declared as BertPooler)
    model.train(False)
    model.requires_grad_(False)
    return model


def with_equal_heads(
    tenants: Sequence[ServedTenant], directory: Path
) -> tuple[list[ServedTenant], int, Literal["pooler", "cls"]]:
    """Copies the tenants' PEFT folders into ``directory``, all classifiers padded to the most labels.

    PEFT's mixed batch needs classifiers of one size. A padding row never has a probability above zero.

    Returns:
        The copies, the number of rows, and what all classifiers read.

    Raises:
        InvalidHeadError: the tenants read different poolings, which one model cannot.
    """
    poolings = {tenant.pooling for tenant in tenants}
    if len(poolings) > 1:
        raise InvalidHeadError("some tenants read the pooler, some the first token; compare them apart")
    num_rows = max(len(tenant.labels) for tenant in tenants)
    copies = []
    for number, tenant in enumerate(tenants):
        target = directory / f"{number:05d}"
        target.mkdir(parents=True)
        configuration = (tenant.directory / "adapter_config.json").read_bytes()
        (target / "adapter_config.json").write_bytes(configuration)
        tensors = load_file(tenant.directory / ADAPTER_FILE)
        save_file(
            {name: _padded(name, tensor, num_rows) for name, tensor in tensors.items()}, target / ADAPTER_FILE
        )
        copies.append(ServedTenant(tenant.name, target, tenant.labels, tenant.pooling))
    return copies, num_rows, poolings.pop()


def _padded(name: str, tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    if not name.endswith(("classifier.weight", "classifier.bias")):
        return tensor
    fill = PADDED_LABEL_BIAS if name.endswith("bias") else 0.0
    rows = tensor.new_full((num_rows - len(tensor), *tensor.shape[1:]), fill)
    return torch.cat([tensor, rows])


def require_peft() -> None:
    """Raises MissingDependencyError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "the comparison needs PEFT; install it by: pip install 'hmi[demo]'"
        ) from error
