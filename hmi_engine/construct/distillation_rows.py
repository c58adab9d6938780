"""The rows of a corpus' windows when the domain layers no longer change: the PLOT of the training text."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import hmi_kernels
from hmi_engine.construct.counting import Progress
from hmi_engine.construct.distillation_cache import is_reserved, reserve_file
from hmi_engine.construct.distillation_corpus import DistillationBatch, Misses
from hmi_engine.construct.distillation_student import Student
from hmi_engine.construct.distillation_windows import MergePlan, plan_merge

__all__ = ["CorpusRows"]

WINDOWS_PER_CALL = 1024
BATCHES_PER_UNION = 64


class CorpusRows:
    """Rows of frozen domain layers as a table holds them, float16: all that the batches' plans can ask for.

    They are computed once, in a fixed order, and kept in a file; where they have no room, each batch's rows
    are computed when they are needed.
    """

    def __init__(self, student: Student, window: int, device: torch.device) -> None:
        self._student, self._window, self._device = student, window, device
        self._windows = self._tokens = np.empty(0, dtype=np.int64)
        self._rows: np.memmap | None = None

    def fill(
        self,
        folder: Path,
        batches: list[DistillationBatch],
        placeholder: int,
        max_bytes: int,
        *,
        all_missing: bool,
        progress: Progress | None = None,
    ) -> None:
        """Computes the rows of all batches, or finds those that an earlier run computed of the same layers.

        Args:
            folder: for the file.
            batches: whose plans will be asked for.
            placeholder: id of the token that stands for one that is not known.
            max_bytes: for a new file; if they are not enough, nothing is kept.
            all_missing: whether any n-gram may be missing, or only the batches' own misses.
            progress: told about the work.

        Raises:
            StoreFullError: no room.
        """
        windows, tokens = _needed(batches, self._window, placeholder, all_missing)
        size = self._student.merge.position_embeddings.shape[1]
        count = len(windows) * self._window + len(tokens)
        self._windows, self._tokens = windows.numpy(), tokens.numpy()
        path = folder / f"rows-{self._digest()}.states"
        # Also where it is larger than it may be now: rows computed batch by batch differ in their last bits.
        if is_reserved(path, (count, size)):
            self._rows = np.memmap(path, dtype=np.float16, mode="r", shape=(count, size))
            return
        if count * size * 2 > max_bytes:
            return
        partial = path.with_suffix(".partial")
        rows = reserve_file(partial, (count, size))
        wide, narrow = hmi_kernels.ngram_tokens(windows)[:, : self._window].long(), tokens
        no_tokens = narrow.new_empty(0)
        for start in range(0, len(wide), WINDOWS_PER_CALL):
            part = wide[start : start + WINDOWS_PER_CALL]
            found = self._compute(part, no_tokens).view(self._window, len(part), size).transpose(0, 1)
            first = start * self._window
            rows[first : first + found.shape[0] * self._window] = found.reshape(-1, size).numpy()
            if progress:
                progress("computing rows of the corpus", start + len(part), len(wide))
        for start in range(0, len(narrow), WINDOWS_PER_CALL):
            part = narrow[start : start + WINDOWS_PER_CALL]
            first = len(wide) * self._window + start
            rows[first : first + len(part)] = self._compute(wide[:0], part).numpy()
        rows.flush()
        partial.replace(path)
        self._rows = rows

    def _digest(self) -> str:
        """Of the domain layers and the windows."""
        digest = hashlib.sha256(self._windows.tobytes() + self._tokens.tobytes())
        for _, parameter in self._student.parts("domain"):
            digest.update(parameter.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def _compute(self, windows: Tensor, tokens: Tensor) -> Tensor:
        none = torch.empty(0)
        plan = MergePlan(windows, tokens, none, none, none).to(self._device)
        return self._student.window_rows(plan).to(torch.float16).cpu()

    def get(self, plan: MergePlan) -> Tensor:
        """The rows of a plan in its order, float32 [M * W + A, H] on the CPU."""
        if self._rows is None:
            return self._compute(plan.windows, plan.tokens).float()
        keys = hmi_kernels.ngram_keys(plan.windows.int()).numpy()
        first = np.searchsorted(self._windows, keys) * self._window
        alone = len(self._windows) * self._window + np.searchsorted(self._tokens, plan.tokens.numpy())
        places = np.concatenate([*(first + slot for slot in range(self._window)), alone])
        return torch.from_numpy(self._rows[places]).float()


def _needed(
    batches: list[DistillationBatch], window: int, placeholder: int, all_missing: bool
) -> tuple[Tensor, Tensor]:
    """Keys of windows, and tokens that stand alone, int64, each sorted and distinct."""
    windows = tokens = torch.empty(0, dtype=torch.int64)
    for start in range(0, len(batches), BATCHES_PER_UNION):
        plans = [
            plan_merge(batch.sequences, misses, window, placeholder)
            for batch in batches[start : start + BATCHES_PER_UNION]
            for misses in _extremes(batch, all_missing)
        ]
        keys = [hmi_kernels.ngram_keys(plan.windows.int()) for plan in plans]
        windows = torch.cat([windows, *keys]).unique()
        tokens = torch.cat([tokens, *(plan.tokens for plan in plans)]).unique()
    return windows, tokens


def _extremes(batch: DistillationBatch, all_missing: bool) -> list[Misses]:
    """Misses whose plans together have every window that a plan with some of them can have."""
    none = torch.zeros(batch.sequences.num_tokens, dtype=torch.bool)
    most = Misses(~none, ~none) if all_missing else batch.misses
    return [Misses(none, none), Misses(none, most.windows), most]
