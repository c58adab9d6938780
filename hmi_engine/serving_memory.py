"""What an engine reserves of the host memory that the engines of a process share."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from hmi_engine.knowledge.sizes import parse_bytes
from hmi_engine.serving_options import EngineOptions
from hmi_engine.serving_traffic import records_traffic
from hmi_engine.store import Store

__all__ = ["release_memory", "reserving_memory"]


@contextmanager
def reserving_memory(
    owner: Hashable, store: Store, options: EngineOptions, *, computes_on_gpu: bool
) -> Iterator[None]:
    """Reserves for ``owner`` what an engine may take, and gives it back if the block, which opens it, fails.

    Raises:
        InsufficientMemoryError: less is left of ``options.memory``.
    """
    if options.memory is not None:
        options.memory.reserve(owner, _parts(store, options, computes_on_gpu=computes_on_gpu))
    try:
        yield
    except BaseException:
        release_memory(owner, options)
        raise


def release_memory(owner: Hashable, options: EngineOptions) -> None:
    """Gives back what ``owner`` reserved, if it did."""
    if options.memory is not None:
        options.memory.release(owner)


def _parts(store: Store, options: EngineOptions, *, computes_on_gpu: bool) -> dict[str, int]:
    """The budgets that lie in host memory, by option; what an engine does not have counts nothing."""
    general = store.general
    names = ["host_memory"]
    if options.device_memory != "auto" and not computes_on_gpu:
        names.append("device_memory")
    if general.plot_layers:
        names.append("overlay_memory")
        if records_traffic(store, options):
            names.append("traffic_memory")
    if general.is_causal and not computes_on_gpu:
        names.append("cache_memory")
        if options.prefix_cache == "shared":
            names.append("shared_prefix_memory")
    return {name: parse_bytes(getattr(options, name)) for name in names}
