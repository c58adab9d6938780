"""Rows computed by the processes of a Ray cluster, each of which holds the domain layers once."""

from __future__ import annotations

import queue
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.models.bert_layer import BertEmbeddings, BertLayer
from hmi_engine.models.bert_loading import BertConfiguration, load_bert_configuration, load_bert_tensors
from hmi_engine.models.windows import WindowLayers

__all__ = ["LayerTensors", "RowWorkers", "layer_tensors"]

_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")


@dataclass(frozen=True, eq=False)
class LayerTensors:
    """What a worker makes domain layers of; it travels, so workers need not see the store's folder.

    Attributes:
        configuration: of the base model.
        num_layers: K, the domain layers.
        tensors: float32, the embeddings and layers 0 to K-1, under transformers' names.
    """

    configuration: BertConfiguration
    num_layers: int
    tensors: dict[str, npt.NDArray[np.float32]]

    def windows(self) -> WindowLayers:
        """The layers as they run over windows."""
        # Copies: what Ray hands out is shared by all processes of a machine, and read-only.
        tensors = {name: torch.tensor(values) for name, values in self.tensors.items()}
        layers = [BertLayer(tensors, index, self.configuration) for index in range(self.num_layers)]
        return WindowLayers(BertEmbeddings(tensors, self.configuration), layers)


def layer_tensors(catalog: Catalog, identity: str) -> LayerTensors:
    """Reads the domain layers of an identity from a store.

    Raises:
        StoreCorruptError: no domain has layers of this identity, or a file is damaged.
    """
    general = catalog.layout.general_folder(catalog.general.folder)
    configuration = load_bert_configuration(general)
    num_layers = catalog.general.plot_layers
    tensors = load_bert_tensors(general, configuration)
    if identity != catalog.general.domain_layers:
        tensors |= _own_layers(catalog, identity)
    wanted = {name: tensor.numpy() for name, tensor in tensors.items() if _is_needed(name, num_layers)}
    return LayerTensors(configuration, num_layers, wanted)


def _own_layers(catalog: Catalog, identity: str) -> dict[str, Tensor]:
    for info in catalog.domains.values():
        if info.layers is not None and info.layer_identity == identity:
            path = catalog.layout.resolve(info.layers.file)
            try:
                return load_file(path)
            except (OSError, SafetensorError) as error:
                raise StoreCorruptError(f"{path}: unreadable domain layers: {error}") from error
    raise StoreCorruptError(
        f"{catalog.layout.catalog}: no domain has domain layers {identity}; run `hmi verify`"
    )


def _is_needed(name: str, num_layers: int) -> bool:
    layer = _LAYER.match(name)
    return name.startswith("embeddings.") if layer is None else int(layer[1]) < num_layers


class _RowWorker:
    """Lives in a process of the cluster."""

    def __init__(self, layers: LayerTensors, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._windows = layers.windows()

    def run(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Tokens [M, W] -> [M, W, H]."""
        rows: npt.NDArray[np.float32] = self._windows(torch.tensor(tokens)).numpy()
        return rows


class RowWorkers:
    """Domain layers that run in some processes of the connected cluster; call it from as many threads."""

    def __init__(self, layers: LayerTensors, num_workers: int, cpus_per_worker: int) -> None:
        """Starts the processes; one that dies is started again and does its work again.

        Each computes with as many threads as this process, because the last bits of a matrix product depend
        on how many share it.
        """
        import ray

        shared = ray.put(layers)
        make = ray.remote(num_cpus=cpus_per_worker, max_restarts=-1, max_task_retries=-1)(_RowWorker)
        num_threads = torch.get_num_threads()
        self._workers: list[Any] = [make.remote(shared, num_threads) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Hidden states of windows, int32 [M, W] with -1 where absent -> float32 [M, W, H].

        Waits for a worker that is idle, and for its answer.
        """
        import ray

        worker = self._idle.get()
        try:
            return torch.tensor(ray.get(worker.run.remote(tokens.numpy())))
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Ends the processes."""
        import ray

        for worker in self._workers:
            ray.kill(worker)
