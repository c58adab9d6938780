"""What a system must do to be measured beside the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from hmi_engine.request import Request, Response

__all__ = ["Peer", "ServedTenant", "answer_stream"]


@dataclass(frozen=True)
class ServedTenant:
    """A classification tenant as every system gets it.

    Attributes:
        name: its name in requests.
        directory: its LoRA and classifier in PEFT's format.
        labels: names of the classifier's rows.
        pooling: what the classifier reads: the base model's pooler, or the first token as it is.
    """

    name: str
    directory: Path
    labels: tuple[str, ...]
    pooling: Literal["pooler", "cls"] = "pooler"


class Peer(Protocol):
    """A system that answers classification requests of many tenants."""

    name: str
    description: str

    def prepare(self, tenants: Sequence[ServedTenant]) -> None:
        """Loads everything; not part of any measurement."""

    def run(self, requests: Sequence[Request]) -> list[Response]:
        """Answers one batch in order, from text to label and probabilities; this is what is timed."""

    def close(self) -> None:
        """Gives memory back."""


def answer_stream(peer: Peer, requests: Sequence[Request], *, batch_size: int) -> list[Response]:
    """Answers a stream in arriving batches of ``batch_size``, one after the other."""
    responses = []
    for start in range(0, len(requests), batch_size):
        responses.extend(peer.run(requests[start : start + batch_size]))
    return responses
