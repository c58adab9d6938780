"""Many small pieces of file work in a few threads: reading, writing, hashing and flushing release the GIL."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["FILE_THREADS", "map_in_threads"]

Item = TypeVar("Item")
Result = TypeVar("Result")

FILE_THREADS = 4
"""More than cores on a small machine: a thread that waits for the disk uses none."""

_IN_FLIGHT_PER_THREAD = 4


def map_in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_threads: int = FILE_THREADS
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for every item, in order; of endless ``items`` only a few are in flight.

    ``items`` is drawn in the caller's thread. The first error, of ``items`` or ``function``, is raised once
    the calls that run have ended; calls that have not begun never do. Whoever may stop before the last
    result closes the generator, which does the same.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > _IN_FLIGHT_PER_THREAD * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
