"""Errors of copies and of page-locked memory; all else raises ValueError, TypeError or RuntimeError."""

__all__ = ["CudaError", "PoolClosedError", "PoolExhaustedError"]


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed; the message names the call and CUDA's error."""


class PoolClosedError(RuntimeError):
    """Memory was asked of a pool that is closed."""


class PoolExhaustedError(RuntimeError):
    """What was asked of a pool and what is in use exceed its budget together."""
