"""Bytes and bank conflicts of the kernel for grouped vectors, as the emulator counts them."""

from __future__ import annotations

from kernels.cuda.vector_traffic import traffic_rows


def test_moves_little_more_than_it_must() -> None:
    for row in traffic_rows():
        assert 1 <= row.ratio <= 1.15, row
        assert row.excess_wavefronts == 0, row
