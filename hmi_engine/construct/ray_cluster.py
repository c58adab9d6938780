"""A Ray cluster on which a domain is counted and its rows are computed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType

import torch

from hmi_engine.construct.materialise import WindowLayersOf
from hmi_engine.construct.ray_rows import RowWorkers, layer_tensors
from hmi_engine.errors import ClusterError, MissingDependencyError
from hmi_engine.knowledge.catalog import Catalog

__all__ = ["RayCluster", "open_cluster"]


class RayCluster:
    """A connection to a cluster; made by :func:`open_cluster`.

    Attributes:
        num_workers: processes that compute rows, each with as many CPUs as this process has threads.
    """

    def __init__(self, catalog: Catalog, cpus_of_nodes: Sequence[int]) -> None:
        """Starts nothing: counting needs the CPUs first."""
        self._catalog = catalog
        self._workers: dict[str, RowWorkers] = {}
        self._cpus_per_worker = min(torch.get_num_threads(), *cpus_of_nodes)
        self.num_workers = sum(cpus // self._cpus_per_worker for cpus in cpus_of_nodes)

    def layers(self, identity: str) -> WindowLayersOf:
        """The domain layers of an identity, which run on the cluster.

        Call them from :attr:`num_workers` threads to keep all workers busy.

        Raises:
            StoreCorruptError: the store has no such layers, or they are damaged.
        """
        if identity not in self._workers:
            layers = layer_tensors(self._catalog, identity)
            self._workers[identity] = RowWorkers(layers, self.num_workers, self._cpus_per_worker)
        return self._workers[identity]

    def close(self) -> None:
        """Ends the workers."""
        for workers in self._workers.values():
            workers.close()
        self._workers.clear()


@contextmanager
def open_cluster(address: str | None, catalog: Catalog) -> Iterator[RayCluster | None]:
    """Connects to a Ray cluster for the time of a ``with`` block.

    Args:
        address: as ``ray.init`` takes it: ``"host:port"``, ``"auto"`` for the cluster that this machine
            belongs to, or ``"local"`` to start one here for the time of the block; None for no cluster. A
            process that is connected already stays with its cluster, and stays connected.
        catalog: of the store.

    Raises:
        MissingDependencyError: Ray is not installed.
        ClusterError: no cluster answers at the address.
    """
    if address is None:
        yield None
        return
    ray = _ray()
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray, address)
    ray.data.DataContext.get_current().enable_progress_bars = False  # progress is told to our caller
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    cluster = RayCluster(catalog, [count for count in cpus if count] or [1])
    try:
        yield cluster
    finally:
        cluster.close()
        if is_ours:
            ray.shutdown()


def _ray() -> ModuleType:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingDependencyError(
            "counting and computing on a cluster need Ray Data, which is not installed: "
            "pip install 'hmi[ray]' on every machine of the cluster, or leave out the address"
        ) from error
    module: ModuleType = ray
    return module


def _connect(ray: ModuleType, address: str) -> None:
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we start sends no statistics
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ClusterError(
            f"no Ray cluster at {address!r}: {reason}; start one with `ray start --head`, or use 'local'"
        ) from error
