"""The overlay keeps what was inserted last, and finds it by the kernels' own index."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hmi_kernels
from hmi_engine.memory.overlay import WindowOverlay


def row_of(key):
    return torch.tensor([[[float(key % 97), float(key % 89)], [float(key % 83), 1.0]]])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(1, 10**6), max_size=8, unique=True), max_size=30))
def test_the_last_generation_is_always_found(batches):
    overlay = WindowOverlay(2 * 8 * 2 * 2 * 4, 2, 2, torch.float32)
    assert overlay.rows_per_generation == 8
    recent = {}
    for batch in batches:
        overlay.reserve(len(batch))
        new = [key for key in batch if not len(find(overlay, key))]
        if new:
            overlay.insert(torch.tensor(new), torch.cat([row_of(key) for key in new]))
        recent |= dict.fromkeys(new)
        for key in batch:
            (row,) = find(overlay, key)
            torch.testing.assert_close(row, row_of(key)[0])
    assert overlay.num_rows <= 16


def find(overlay, key):
    found = []
    for index, rows in zip(overlay.indexes, overlay.row_tables, strict=True):
        number = int(hmi_kernels.plot_index_find(index, torch.tensor([key]))[0])
        if number >= 0:
            found.append(rows[number])
    return [row for row in found if row is not None] or ()


def test_more_than_it_holds():
    overlay = WindowOverlay(2 * 4 * 2 * 2 * 4, 2, 2, torch.float32)
    with pytest.raises(ValueError, match="4 rows"):
        overlay.reserve(5)
    with pytest.raises(ValueError, match="do not fit"):
        overlay.insert(torch.arange(1, 6), torch.zeros(5, 2, 2))
