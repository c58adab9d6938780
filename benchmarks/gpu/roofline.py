"""What the device could do at best, and how much of it a measurement reached (Williams et al., 2009)."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.gpu.costs import Cost

__all__ = ["Peak", "data_sheet_peak", "least_seconds", "roofline_share"]


class Peak(NamedTuple):
    """Bytes per second of device memory and 16-bit floating-point operations per second."""

    bandwidth: float
    flops: float


_DATA_SHEETS = (
    ("H200", Peak(4.8e12, 989e12)),
    ("H100 80GB HBM3", Peak(3.35e12, 989e12)),
    ("H100 NVL", Peak(3.9e12, 835e12)),
    ("H100 PCIe", Peak(2.0e12, 756e12)),
    ("A100-SXM4-80GB", Peak(2.039e12, 312e12)),
    ("A100 80GB PCIe", Peak(1.935e12, 312e12)),
    ("A100-SXM4-40GB", Peak(1.555e12, 312e12)),
    ("A100-PCIE-40GB", Peak(1.555e12, 312e12)),
    ("L40S", Peak(0.864e12, 362e12)),
    ("L4", Peak(0.3e12, 121e12)),
)
"""NVIDIA's data sheets, dense products with float32 sums; the first whose name the device's contains."""


def data_sheet_peak(device_name: str) -> Peak | None:
    """The maker's figures for the device, or None where the table does not know it."""
    return next((peak for name, peak in _DATA_SHEETS if name in device_name), None)


def least_seconds(cost: Cost, peak: Peak) -> float:
    """The time below which the device cannot do it: that of the bytes or of the operations."""
    return max(cost.bytes / peak.bandwidth, cost.flop / peak.flops)


def roofline_share(cost: Cost, peak: Peak, seconds: float) -> float:
    """The part of the device's best that a call reached which took ``seconds``."""
    return least_seconds(cost, peak) / seconds
