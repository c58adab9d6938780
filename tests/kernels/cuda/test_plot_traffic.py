"""Bytes and bank conflicts of look-up and merge of PLOT, as the emulator counts them."""

from __future__ import annotations

import pytest
from kernels.cuda.plot_traffic import lookup_rows, merge_rows


def test_lookup_moves_little_more_than_it_must() -> None:
    for row in lookup_rows():
        assert 0.95 <= row.ratio <= 1.15, row
        assert row.excess_wavefronts == 0, row


@pytest.mark.slow
def test_merge_moves_little_more_than_it_must() -> None:
    for row in merge_rows():
        assert 0.99 <= row.ratio <= 1.15, row
        assert row.excess_wavefronts == 0, row
