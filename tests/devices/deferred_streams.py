"""A device made of the CPU whose work runs late: a missing event or a slot reused too early is seen.

Whatever torch does inside ``on(stream)`` is not run but queued, kernels of ours included; its new tensors are
full of NaN until it is. Queues run when the host waits for an event, and a little now and then before, in an
order drawn at random that respects only what a GPU respects: the order of one stream, and events that another
waits for. Views are made at once, as on a GPU. Reading a value on the host inside ``on`` is an error, as it
would make a real one wait.

What it does not show: memory that torch's allocator gives to somebody else while it is in use (a queue keeps
alive what it needs), and time.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from hmi_engine.memory.streams import STREAM_NAMES

__all__ = ["DeferredStreams", "ForgottenEvent"]


class _Event:
    def __init__(self, streams: DeferredStreams) -> None:
        self._streams = streams
        self.has_run = False

    def query(self) -> bool:
        return self.has_run

    def synchronize(self) -> None:
        self._streams.run_until(lambda: self.has_run)


class ForgottenEvent(_Event):
    """Who waits for it goes on at once; for deliberate mistakes."""

    def __init__(self) -> None:
        self.has_run = True

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


class _Graph:
    """Work that is queued again, on the tensors that it was captured with."""

    def __init__(self, streams: DeferredStreams, stream: str, captured: list[Callable[[], None]]) -> None:
        self._streams, self._stream, self._captured = streams, stream, captured

    def replay(self) -> None:
        self._streams.num_replays += 1
        for work in self._captured:
            self._streams._put(self._stream, work)


class DeferredStreams:
    """``hmi_engine.memory.streams.DeviceStreams`` in the hand of a random generator."""

    device = torch.device("cpu")
    is_asynchronous = True
    preferred_dtype = torch.float32
    has_graphs = True

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        # A stream may be far ahead of the others, or far behind.
        self._weights = {name: self._random.choice((0.02, 1.0, 50.0)) for name in STREAM_NAMES}
        self._eagerness = self._random.choice((0.0, 0.1, 0.6))
        self._queues: dict[str, deque[Callable[[], None] | _Event]] = {n: deque() for n in STREAM_NAMES}
        self._lock = threading.RLock()
        self.num_run = self.num_replays = 0

    @contextmanager
    def on(self, stream: str) -> Iterator[None]:
        with _Deferring(lambda work: self._put(stream, work)):
            yield

    def record(self, stream: str) -> _Event:
        event = _Event(self)

        def reached() -> None:
            event.has_run = True

        self._put(stream, reached)
        return event

    def wait(self, stream: str, event: _Event) -> None:
        self._put(stream, event)

    def copy(self, destinations: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        with self.on("copy"):
            for destination, source in zip(destinations, sources, strict=True):
                destination.copy_(source)

    def capture(self, stream: str, work: Callable[[], Any]) -> tuple[_Graph, Any]:
        captured: list[Callable[[], None]] = []
        with _Deferring(captured.append):
            results = work()
        return _Graph(self, stream, captured), results

    def synchronize(self) -> None:
        self.run_until(lambda: not any(self._queues.values()))

    def pinned(self, num_bytes: int) -> Tensor:
        return torch.full((num_bytes,), 255, dtype=torch.uint8)  # NaN, and ids that cannot be

    def run_until(self, is_enough: Callable[[], bool]) -> None:
        while True:
            with self._lock:
                if is_enough():
                    return
                assert self._run_one(), "streams wait for an event that nobody records"

    def _put(self, stream: str, work: Callable[[], None] | _Event) -> None:
        with self._lock:
            self._queues[stream].append(work)
            while self._random.random() < self._eagerness and self._run_one():
                pass

    def _run_one(self) -> bool:
        """Runs the first piece of some stream; False if all are empty, or wait."""
        runnable = [name for name, queue in self._queues.items() if self._can_run(queue)]
        if not runnable:
            return False
        (chosen,) = self._random.choices(runnable, [self._weights[name] for name in runnable])
        work = self._queues[chosen].popleft()
        if not isinstance(work, _Event):
            with torch.inference_mode(), _disable_current_modes():  # also if some `on` is being put together
                work()
            self.num_run += 1
        return True

    @staticmethod
    def _can_run(queue: deque[Callable[[], None] | _Event]) -> bool:
        return bool(queue) and (not isinstance(queue[0], _Event) or queue[0].has_run)


class _Deferring(TorchDispatchMode):
    """Queues every op of this thread, and gives tensors that will hold its results."""

    def __init__(self, put: Callable[[Callable[[], None]], None]) -> None:
        super().__init__()
        self._put = put

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode torch leaves them whole: `to` may or may not be a view
                return func.decompose(*args, **kwargs)
        schema = func._schema
        if not schema.is_mutable and any(returned.alias_info is not None for returned in schema.returns):
            return func(*args, **kwargs)  # a view
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("a value is read on the host while it is on its way: a GPU would wait here")
        if schema.is_mutable and all(returned.alias_info is not None for returned in schema.returns):
            self._put(lambda: func(*args, **kwargs))
            return _written(schema, args, kwargs)
        results = _promised(func, args, kwargs)

        def run() -> None:
            for promised, found in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                promised.copy_(found)

        self._put(run)
        return results


def _written(schema: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The tensor that an op changes and returns, if it returns one."""
    if not schema.returns:
        return None
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
    changed = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    results = [named[name] for name in changed]
    return results[0] if len(results) == 1 else tuple(results)


def _promised(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Tensors of the shapes that the op will give, full of what is not there yet."""

    def shape_only(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return torch.device("meta") if isinstance(value, torch.device) else value

    shapes = func(*tree_map(shape_only, args), **tree_map(shape_only, kwargs))
    return tree_map(_unknown, shapes)


def _unknown(shape: Any) -> Any:
    if not isinstance(shape, Tensor):
        return shape
    result = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
    return result.fill_(float("nan") if result.is_floating_point() else torch.iinfo(result.dtype).min)
