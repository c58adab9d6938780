"""What callers are told of a mistake of the engine's own."""

from __future__ import annotations

import logging

from hmi_engine.errors import EngineFaultError, HmiError

__all__ = ["as_fault"]

_logger = logging.getLogger("hmi_engine")


def as_fault(error: Exception, stage: str) -> HmiError:
    """The error for the requests that a stage worked on: ``error``, or where that is no HmiError a fault.

    A fault is logged with its traceback.
    """
    if isinstance(error, HmiError):
        return error
    _logger.error("the engine failed in stage %r", stage, exc_info=error)
    fault = EngineFaultError(
        f"the engine failed in stage {stage!r}: {type(error).__name__}: {error}; the log has the details, "
        "and other batches are not concerned"
    )
    fault.__cause__ = error
    return fault
