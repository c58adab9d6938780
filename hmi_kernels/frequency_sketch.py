"""The frequent keys of a stream, in bounded memory."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
from torch import Tensor

from hmi_kernels.checks import require_on_cpu, require_packed, require_vector, require_window
from hmi_kernels.native import native, native_reason
from hmi_kernels.ngrams import ngram_keys

__all__ = ["FrequencySketch"]

_PURGED_SHARE = 4  # as in csrc/cpu/frequency_sketch.cpp
_BYTES_PER_ITEM_OF_TORCH = 64  # two arrays of key and weight, old and new, while a batch is added


class FrequencySketch:
    """Keys and their summed weights; when full it forgets light keys and says how much that can have cost.

    For every key ``weight <= true weight <= weight + max_error``, where a key that is missing weighs 0: so
    each key whose true weight exceeds ``max_error`` is there. ``max_error`` is at most the total over three
    quarters of ``max_items``; from 2048 items on there are 2 to 16 shards, which share distinct keys evenly
    but for chance, and this holds for each shard's total over its items.

    Method: Misra-Gries counters purged a quarter at a time (Anderson, Bevan, Lang, Liberty, Rhodes and
    Thaler, "A high-performance algorithm for identifying frequent items in data streams", IMC 2017).

    Thread-safe: calls run without the interpreter's lock, those of several threads beside each other. Weights
    are float64: sums of integers are exact below 2**53.
    """

    def __init__(self, max_items: int) -> None:
        """Takes little memory at first; ``max_items`` keys at most. Raises ValueError if that is below 1."""
        if max_items < 1:
            raise ValueError(f"max_items must be positive, not {max_items}")
        self.max_items = max_items
        self._sketch: Any = _TorchSketch(max_items) if native_reason else native.FrequencySketch(max_items)

    @staticmethod
    def max_memory_bytes(max_items: int) -> int:
        """The most memory that a sketch of so many items ever takes: about 23 bytes each, 43 below 2048."""
        if native_reason:
            return _BYTES_PER_ITEM_OF_TORCH * max_items
        return native.sketch_max_memory_bytes(max_items)

    @classmethod
    def items_within(cls, max_bytes: int) -> int:
        """The largest ``max_items`` (0 if none) whose sketch never takes more than ``max_bytes``."""
        fits, too_many = 0, max(1, max_bytes)
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if cls.max_memory_bytes(middle) <= max_bytes:
                fits = middle
            else:
                too_many = middle
        return fits

    def add(self, keys: Tensor, weight: float = 1.0) -> None:
        """Adds ``weight`` to each key.

        Args:
            keys: int64 [n], on the CPU; a key may come several times; 0 stands for none and is skipped.
            weight: positive and finite.

        Raises TypeError or ValueError, and adds nothing, on other arguments.
        """
        require_vector("keys", keys, torch.int64)
        require_on_cpu("keys", keys)
        _require_positive("weight", weight)
        if isinstance(self._sketch, _TorchSketch):
            self._sketch.add(keys, weight)
        else:
            self._sketch.add(keys.data_ptr(), keys.shape[0], weight)

    def add_windows(
        self,
        input_ids: Tensor,
        sequence_offsets: Tensor,
        sequence_numbers: Tensor,
        *,
        window: int,
        is_causal: bool = False,
        weight: float = 1.0,
    ) -> None:
        """Adds the keys that a PLOT look-up of some of the sequences asks for.

        ``window=2``: every two neighbours, in slots 0 and 1. ``window=3``: every three, and every two both in
        slots 0, 1 and in slots 1, 2: windows at a sequence's ends, and what a missing one is composed of.
        ``is_causal``, for a decoder: those in slots 1, 2 are left out.

        Args:
            input_ids: int32 [tokens], on the CPU, the sequences laid end to end.
            sequence_offsets: int64 [sequences + 1], on the CPU.
            sequence_numbers: int64 [n], on the CPU, which of the sequences; each is added as often as it is
                named.
            window: 2 or 3.
            is_causal: whether windows are those of a decoder.
            weight: positive and finite.

        Raises TypeError or ValueError, and adds nothing, on other arguments.
        """
        require_packed(input_ids, sequence_offsets)
        require_vector("sequence_numbers", sequence_numbers, torch.int64)
        require_window(window)
        for name, tensor in (
            ("input_ids", input_ids),
            ("sequence_offsets", sequence_offsets),
            ("sequence_numbers", sequence_numbers),
        ):
            require_on_cpu(name, tensor)
        _require_positive("weight", weight)
        if is_causal or isinstance(self._sketch, _TorchSketch):
            self.add(_window_keys(input_ids, sequence_offsets, sequence_numbers, window, is_causal), weight)
            return
        self._sketch.add_windows(
            input_ids.data_ptr(),
            input_ids.shape[0],
            sequence_offsets.data_ptr(),
            sequence_offsets.shape[0] - 1,
            sequence_numbers.data_ptr(),
            sequence_numbers.shape[0],
            window,
            weight,
        )

    def merge(self, other: FrequencySketch) -> None:
        """Adds another sketch, of any size: totals and error bounds add up."""
        self._sketch.merge(other._sketch)

    def scale(self, factor: float) -> None:
        """Multiplies weights, total and error by a positive, finite factor, as decay does."""
        _require_positive("factor", factor)
        self._sketch.scale(factor)

    def clear(self) -> None:
        """Forgets everything and gives the memory back."""
        self._sketch.clear()

    def items(self, min_weight: float = 0.0) -> tuple[Tensor, Tensor]:
        """Those of at least ``min_weight``: keys int64 [n], ascending, and weights float64 [n]."""
        if isinstance(self._sketch, _TorchSketch):
            return self._sketch.items(min_weight)
        items = self._sketch.items(min_weight)
        if not items:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        pairs = torch.frombuffer(items, dtype=torch.int64).view(-1, 2)
        return pairs[:, 0].contiguous(), pairs[:, 1].contiguous().view(torch.float64)

    def __len__(self) -> int:
        """How many keys are held."""
        return len(self._sketch)

    @property
    def total(self) -> float:
        """All the weight that was added, that of forgotten keys too."""
        return float(self._sketch.total)

    @property
    def max_error(self) -> float:
        """The most by which a weight is too low."""
        return float(self._sketch.max_error)

    @property
    def memory_bytes(self) -> int:
        """The memory that it takes now."""
        return int(self._sketch.memory_bytes)


def _require_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {value}")


def _window_keys(
    input_ids: Tensor, sequence_offsets: Tensor, sequence_numbers: Tensor, window: int, is_causal: bool
) -> Tensor:
    lengths = sequence_offsets.diff()
    if int(sequence_offsets[0]) != 0 or int(lengths.sum()) != input_ids.shape[0] or bool((lengths < 0).any()):
        raise ValueError(f"sequence_offsets must rise from 0 to the {input_ids.shape[0]} tokens")
    if bool(((sequence_numbers < 0) | (sequence_numbers >= lengths.shape[0])).any()):
        raise ValueError(f"sequence_numbers must lie below the {lengths.shape[0]} sequences")
    sequences = input_ids.split(lengths.tolist())
    parts = []
    for number in sequence_numbers.tolist():
        ids = sequences[number]
        absent = torch.full_like(ids[1:], -1)
        parts.append(torch.stack([ids[:-1], ids[1:], absent], dim=1))
        if window == 3 and not is_causal:
            parts.append(torch.stack([absent, ids[:-1], ids[1:]], dim=1))
        if window == 3:
            parts.append(torch.stack([ids[:-2], ids[1:-1], ids[2:]], dim=1))
    return ngram_keys(torch.cat(parts)) if parts else torch.empty(0, dtype=torch.int64)


class _TorchSketch:
    """The sketch where the compiled one is missing: one shard, kept as sorted tensors."""

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self._keys = torch.empty(0, dtype=torch.int64)
            self._weights = torch.empty(0, dtype=torch.float64)
            self.total = self.max_error = 0.0

    def add(self, keys: Tensor, weight: float) -> None:
        if bool((keys < 0).any()):
            raise ValueError("keys must be positive, or 0 for none")
        for part in keys[keys != 0].split(self._max_items):
            self._add_weights(part, torch.full(part.shape, weight, dtype=torch.float64))

    def _add_weights(self, keys: Tensor, weights: Tensor) -> None:
        with self._lock:
            self.total += float(weights.sum())
            self._keys, places = torch.unique(torch.cat([self._keys, keys]), return_inverse=True)
            summed = torch.zeros(self._keys.shape, dtype=torch.float64)
            self._weights = summed.index_add_(0, places, torch.cat([self._weights, weights]))
            while len(self) > self._max_items:
                self._purge()

    def _purge(self) -> None:
        subtracted = self._weights.kthvalue(1 + len(self) // _PURGED_SHARE).values
        kept = self._weights > subtracted
        self._keys, self._weights = self._keys[kept], self._weights[kept] - subtracted
        self.max_error += float(subtracted)

    def merge(self, other: _TorchSketch) -> None:
        with other._lock:
            keys, weights = other.items(0)
            total, max_error = other.total, other.max_error
        with self._lock:
            self._add_weights(keys, weights)
            self.total += total - float(weights.sum())
            self.max_error += max_error

    def scale(self, factor: float) -> None:
        with self._lock:
            self._weights = self._weights * factor
            self.total *= factor
            self.max_error *= factor

    def items(self, min_weight: float) -> tuple[Tensor, Tensor]:
        with self._lock:
            wanted = self._weights >= min_weight
            return self._keys[wanted], self._weights[wanted]

    def __len__(self) -> int:
        return self._keys.shape[0]

    @property
    def memory_bytes(self) -> int:
        return 2 * self._keys.nbytes
