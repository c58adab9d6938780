"""Cached hidden states: what is on the disk is read, and nothing else."""

import errno
from pathlib import Path

import pytest
import torch

from hmi_engine.construct import distillation_cache
from hmi_engine.construct.distillation_cache import StateCache
from hmi_engine.errors import StoreFullError

STATES = torch.arange(24.0).view(2, 3, 4)


def opened(path: Path) -> StateCache:
    return StateCache(path, [3, 3], 4, 1 << 20)


def read(path: Path, computed: torch.Tensor) -> torch.Tensor:
    """Both batches, as they are kept or else as they are ``computed``; they are kept then."""
    cache = opened(path)
    found = [cache.get(number, lambda number=number: computed[number]) for number in (0, 1)]
    cache.sync()
    return torch.stack(found)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(bytes(6))])
def test_states_that_are_gone_are_computed_again(tmp_path, damage) -> None:
    path = tmp_path / "teacher.states"
    assert torch.equal(read(path, STATES), STATES)
    assert torch.equal(read(path, STATES + 1), STATES)
    damage(path)
    assert torch.equal(read(path, STATES + 2), STATES + 2)
    assert torch.equal(read(path, STATES), STATES + 2)


def test_no_note_of_states_outlives_a_file_that_is_made_anew(tmp_path, monkeypatch) -> None:
    """The process ends when the new file has its size and nothing else."""
    path = tmp_path / "teacher.states"
    read(path, STATES)
    path.unlink()

    def end(*arguments: object) -> None:
        path.write_bytes(bytes(2 * STATES.numel()))
        raise KeyboardInterrupt

    monkeypatch.setattr(distillation_cache.os, "posix_fallocate", end)
    with pytest.raises(KeyboardInterrupt):
        opened(path)
    monkeypatch.undo()
    assert torch.equal(read(path, STATES + 1), STATES + 1)


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(distillation_cache.os, "posix_fallocate", refuse)
    with pytest.raises(StoreFullError, match="cache_bytes"):
        opened(tmp_path / "teacher.states")
    assert list(tmp_path.iterdir()) == []
