"""Bytes and bank conflicts of the adapter kernel on tensor cores, as the emulator counts them."""

from __future__ import annotations

import pytest
from kernels.cuda.adapter_traffic import traffic_rows


@pytest.mark.slow
def test_moves_little_more_than_it_must() -> None:
    for row in traffic_rows():
        assert 1 <= row.ratio <= 1.15, row
        assert row.excess_wavefronts == 0, row
