"""Forms token-budget batches of packed sequences."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["QueuedSequence", "form_batches"]


@dataclass(frozen=True)
class QueuedSequence:
    """What the scheduler knows of a request: its tenant, its tokens, and the tenant's bytes in memory."""

    tenant: Hashable
    num_tokens: int
    adapter_bytes: int


def form_batches(
    queue: Sequence[QueuedSequence], *, max_batch_tokens: int, max_adapter_bytes: int
) -> Iterator[list[int]]:
    """Splits a queue, first come first served, into batches of indexes into ``queue``.

    A batch holds at most ``max_batch_tokens`` tokens and tenants of at most ``max_adapter_bytes`` together,
    but always at least one sequence. Inside a batch the sequences of a tenant stand together, in the order of
    their tenant's first arrival, so that each tenant is one segment of the grouped kernels.
    """
    batch: dict[Hashable, list[int]] = {}
    tokens = adapter_bytes = 0
    for index, sequence in enumerate(queue):
        new_bytes = 0 if sequence.tenant in batch else sequence.adapter_bytes
        too_many_tokens = tokens + sequence.num_tokens > max_batch_tokens
        if batch and (too_many_tokens or adapter_bytes + new_bytes > max_adapter_bytes):
            yield _in_tenant_order(batch)
            batch, tokens, adapter_bytes = {}, 0, 0
            new_bytes = sequence.adapter_bytes
        batch.setdefault(sequence.tenant, []).append(index)
        tokens += sequence.num_tokens
        adapter_bytes += new_bytes
    if batch:
        yield _in_tenant_order(batch)


def _in_tenant_order(batch: dict[Hashable, list[int]]) -> list[int]:
    return [index for indexes in batch.values() for index in indexes]
