"""The search for rows alone: HMI's index, the numba baseline, and tables that everybody has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

import hmi_kernels
from benchmarks.peers.key_tables import DuckDbTable, Find, PythonTable, SqliteTable, search
from benchmarks.peers.numba_search import NumbaSearch
from benchmarks.result import Case, Ratio, System
from hmi_engine.demo.timing import interleave
from hmi_engine.errors import HmiError
from hmi_engine.models.packing import PackedSequences

__all__ = ["lookup_case", "lookup_systems"]

OURS = "HMI look-up"
_DESCRIPTIONS = {
    OURS: "open addressing, prefetched, all threads; one call from token ids to rows",
    "numba, one thread": "typed dictionary, one compiled loop from token ids to rows",
    "numba, all threads": "the same, sequences shared out to all threads",
    "Python dict": "keys by numpy for the whole batch, then one get for each",
    "DuckDB": "keys by numpy, joined with a table in memory, all threads",
    "SQLite": "keys by numpy, joined with a table in memory over its primary key",
}
WARM_UP = 1

_Array: TypeAlias = npt.NDArray[Any]
_Search = Callable[[PackedSequences], _Array]


def lookup_case(
    name: str,
    index: torch.Tensor,
    keys: torch.Tensor,
    batches: Sequence[PackedSequences],
    *,
    window: int,
    repetitions: int,
) -> Case:
    """Tokens a second of each system's search, one call for each batch.

    Args:
        name: the case's name.
        index: int64 [slots, 2], HMI's index of the keys.
        keys: int64 [N]; row i belongs to key i.
        batches: what is looked up.
        window: 2 or 3 tokens.
        repetitions: how often all batches are looked up.

    Raises:
        HmiError: two systems do not find the same.
    """
    systems = lookup_systems(index, keys, window=window)
    hits = _check_equal(systems, batches)
    seconds = interleave(
        {system: partial(_exhaust, run, batches) for system, run in systems.items()},
        repetitions,
        warm_up=WARM_UP,
    )
    num_tokens = sum(batch.num_tokens for batch in batches)
    work = [num_tokens] * repetitions
    measured = {
        system: System.of(system, _DESCRIPTIONS[system], seconds[system], work, "tokens")
        for system in systems
    }
    return Case(
        name=name,
        settings={
            "window": window,
            "sequences_per_call": batches[0].num_sequences,
            "rows": len(keys),
            "index_bytes": index.nbytes,
            "tokens": num_tokens,
            "share_of_tokens_found": round(hits / num_tokens, 3),
        },
        systems=tuple(measured.values()),
        ratios=tuple(Ratio.of(measured[OURS], measured[peer]) for peer in measured if peer != OURS),
    )


def lookup_systems(index: torch.Tensor, keys: torch.Tensor, *, window: int) -> dict[str, _Search]:
    """Each finds the rows of a batch's windows: int64 [T, 1] or [T, 3], -1 where missing."""
    numbers = keys.numpy()

    def ours(batch: PackedSequences) -> _Array:
        chains = torch.zeros(batch.num_sequences, 1, dtype=torch.int32)
        found = hmi_kernels.plot_lookup(batch.input_ids, batch.offsets, [index], chains, window=window)
        result: _Array = found.numpy()
        return result

    def compiled(parallel: bool) -> _Search:
        peer = NumbaSearch(numbers, window=window, parallel=parallel)
        return lambda batch: peer.run(batch.input_ids.numpy(), batch.offsets.numpy())

    def general(find: Find) -> _Search:
        return lambda batch: search(find, batch.input_ids.numpy(), batch.offsets.numpy(), window=window)

    systems = (
        ours,
        compiled(False),
        compiled(True),
        general(PythonTable(numbers).find),
        general(DuckDbTable(numbers, torch.get_num_threads()).find),
        general(SqliteTable(numbers).find),
    )
    return dict(zip(_DESCRIPTIONS, systems, strict=True))


def _check_equal(systems: dict[str, _Search], batches: Sequence[PackedSequences]) -> int:
    """Positions that found any row. Raises HmiError where a system finds others than HMI."""
    hits = 0
    for batch in batches:
        expected = systems[OURS](batch)
        hits += int((expected >= 0).any(axis=1).sum())
        for name, run in systems.items():
            if not np.array_equal(run(batch), expected):
                raise HmiError(f"{name} and {OURS} do not find the same rows")
    return hits


def _exhaust(run: _Search, batches: Sequence[PackedSequences], _: int) -> None:
    """Batch after batch; a batch's memory is given back before the next, as in service."""
    results: Iterator[_Array] = map(run, batches)
    deque(results, maxlen=0)
