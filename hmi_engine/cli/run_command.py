"""``hmi run``: JSON lines in, JSON lines out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, get_args

import typer

from hmi_engine.cli.output import StorePath, checked_choice, warn
from hmi_engine.engine import Engine
from hmi_engine.errors import InvalidRequestError
from hmi_engine.memory.device_choice import DEVICE_NAMES, is_device_name
from hmi_engine.pipeline.step import MissPolicy
from hmi_engine.request import Request, Response
from hmi_engine.sampling import Sampling
from hmi_engine.serving_options import DTYPES, MAX_PIPELINE_DEPTH
from hmi_engine.store import Store

_FIELDS = ("tenant", "text", "input_ids", "long_text", "id", "sampling")
_POLICIES: tuple[MissPolicy, ...] = get_args(MissPolicy)


def run(
    store: StorePath,
    miss: Annotated[
        str,
        typer.Option(
            help="Where the table has no row: backoff (compose it), exact (compute it), or budget (compute "
            "the most frequent, compose the others)."
        ),
    ] = "backoff",
    exact_budget: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="--miss budget: most windows computed per token of a batch."),
    ] = 0.05,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Most tokens computed at once.")] = 8192,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, or auto: the GPU, if there is one that can be used.")
    ] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="What a GPU computes in: float32, float16, bfloat16, or auto: 16 bits. CPU: float32, or "
            "bfloat16 for products with the base."
        ),
    ] = "auto",
    host_memory: Annotated[str, typer.Option(help="Budget for adapters in host memory.")] = "2GiB",
    device_memory: Annotated[
        str, typer.Option(help="Budget for adapters where the device computes; on the CPU none of its own.")
    ] = "auto",
    pipeline_depth: Annotated[
        int, typer.Option(min=1, max=MAX_PIPELINE_DEPTH, help="Most batches in flight; 1: no pipeline.")
    ] = 2,
    trace: Annotated[
        Path | None, typer.Option(help="File for a trace of all stages, which Perfetto shows.")
    ] = None,
    record_traffic: Annotated[
        bool, typer.Option("--record-traffic", help="Count n-grams in the store, for `hmi domain update`.")
    ] = False,
    chunk: Annotated[int, typer.Option(min=1, help="Lines read before the first answers.")] = 256,
    as_json: Annotated[
        bool, typer.Option("--json", help="Accepted for symmetry: the output always is JSON lines.")
    ] = True,
) -> None:
    """Answer requests from standard input: lines {"tenant": ..., "text": ...}; one line out per line in.

    For tenants that generate text: {"tenant": ..., "text": ..., "sampling": {"max_tokens": 32, ...}}.

    A line that cannot be served is answered by {"error": {"type", "message"}}; the others go on.
    """
    policy = checked_choice(miss, _POLICIES, "--miss")
    failed = total = 0
    with (
        Store.open(store, read_only=not record_traffic) as opened,
        Engine(
            opened,
            device=_checked_device(device),
            dtype=checked_choice(dtype, ("auto", *DTYPES), "--dtype"),
            miss=policy,
            exact_budget=exact_budget,
            max_batch_tokens=max_batch_tokens,
            device_memory=device_memory,
            host_memory=host_memory,
            pipeline_depth=pipeline_depth,
            trace=trace,
            record_traffic=record_traffic,
        ) as engine,
    ):
        for lines in _chunks(sys.stdin.buffer, chunk):
            for answer in _answer(engine, lines):
                total += 1
                failed += "error" in answer
                sys.stdout.write(json.dumps(answer, ensure_ascii=False) + "\n")
            sys.stdout.flush()
    if failed:
        warn(f"{failed} of {total} lines were answered with an error")


def _checked_device(name: str) -> str:
    if not is_device_name(name):
        raise typer.BadParameter(f"{name!r} is not one of {DEVICE_NAMES}", param_hint="--device")
    return name


def _chunks(source: BinaryIO, size: int) -> Iterator[list[tuple[int, bytes]]]:
    """Numbered lines, as bytes: one that is no UTF-8 is one bad line, not the end of all."""
    numbered = ((number, line) for number, line in enumerate(source, start=1) if line.strip())
    while chunk := list(islice(numbered, size)):
        yield chunk


def _answer(engine: Engine, lines: Iterable[tuple[int, bytes]]) -> list[dict[str, Any]]:
    """Answers in the order of the lines; the good ones go through the engine together."""
    parsed = [_parse(number, line) for number, line in lines]
    requests = [request for request in parsed if isinstance(request, Request)]
    served = iter(engine.run(requests))
    return [(next(served) if isinstance(request, Request) else request).to_dictionary() for request in parsed]


def _parse(number: int, line: bytes) -> Request | Response:
    try:
        fields = _fields(line)
        if "sampling" in fields:
            fields["sampling"] = Sampling.of(fields["sampling"])
    except InvalidRequestError as error:
        told = InvalidRequestError(f"line {number}: {error}")
        return Response(tenant="", kind="error", error=told)
    return Request(**fields)


def _fields(line: bytes) -> dict[str, Any]:
    fields = _read_json(line)
    if not isinstance(fields, dict):
        raise InvalidRequestError('not an object; expected {"tenant": ..., "text": ...}')
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise InvalidRequestError(f"unknown field {unknown[0]!r}; known are {', '.join(_FIELDS)}")
    if "tenant" not in fields:
        raise InvalidRequestError("the field 'tenant' is missing")
    return fields


def _read_json(line: bytes) -> Any:
    """What a line holds; raises InvalidRequestError unless the answer could give all of it back as text."""
    try:
        value = json.loads(line.decode())
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InvalidRequestError(f"no JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"no UTF-8: {error.reason} at byte {error.start + 1}") from None
    except UnicodeEncodeError:
        raise InvalidRequestError("half of a surrogate pair is no character; write the whole pair") from None
    except RecursionError:
        raise InvalidRequestError("too many lists or objects inside each other") from None
    except ValueError as error:  # an integer of thousands of digits
        raise InvalidRequestError(f"no JSON that can be read: {error}") from None
    return value
