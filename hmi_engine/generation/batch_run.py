"""A list of requests to decoders, answered together in the caller's thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from hmi_engine.errors import EngineClosedError, HmiError
from hmi_engine.generation.core import DecoderCore
from hmi_engine.pipeline.faults import as_fault
from hmi_engine.request import Request, Response

__all__ = ["run_requests"]


def run_requests(core: DecoderCore, requests: Sequence[Request]) -> list[Response]:
    """Answers requests, in their order; one that fails carries its error and harms no other."""
    started = time.perf_counter()
    responses: list[Response | None] = [None] * len(requests)
    with core.use_backend():
        try:
            for index, admitted in enumerate(core.admit(requests)):
                try:
                    if isinstance(admitted, HmiError):
                        raise admitted
                    respond = partial(responses.__setitem__, index)
                    core.loop.add(core.sequence(admitted, respond, arrived=started))
                except Exception as error:
                    responses[index] = Response.failed(requests[index], as_fault(error, "admit"))
            while core.loop.step():
                pass
        finally:
            _fail_rest(core)
            answered = [response for response in responses if response is not None]
            core.statistics.count_answers(
                len(answered), sum(response.error is not None for response in answered)
            )
        core.rest()
    return answered


_INTERRUPTED = EngineClosedError("the call was interrupted before the request was answered")


def _fail_rest(core: DecoderCore) -> None:
    """After an interruption: nothing stays in the loop for the next call."""
    for sequence in core.loop.abandon():
        core.release(sequence)
        sequence.respond(Response.failed(sequence.request, _INTERRUPTED))
