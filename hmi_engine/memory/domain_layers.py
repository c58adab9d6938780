"""The domain layers of each identity, loaded when they are first asked for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import NamedTuple

from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.domain_layers import load_domain_layers
from hmi_engine.models.families import AnyWindowLayers, HierarchicalModel

__all__ = ["DomainLayerLibrary"]


class _Loaded(NamedTuple):
    layers: AnyWindowLayers
    file: Path


class DomainLayerLibrary:
    """Finds layers by identity: the base model's, or those of the domain that brought its own. Thread-safe.

    Layers that no domain has any more are forgotten when others are loaded; the second time, as a batch that
    began before its domain was changed may still ask for them.
    """

    def __init__(self, catalog: Catalog, model: HierarchicalModel, general: GeneralInfo) -> None:
        """``general`` describes ``model``."""
        self._catalog, self._general = catalog, general
        self._model = model
        self._lock = threading.Lock()
        self._loaded: dict[str, _Loaded] = {}
        self._unused: set[str] = set()  # when others were loaded last

    def __call__(self, identity: str) -> AnyWindowLayers:
        """Returns the layers of an identity.

        Raises:
            GeneralChangedError: the base model is not the one that these layers belong to any more.
            StoreCorruptError: no domain has layers of this identity, or their file is damaged.
        """
        if identity == self._general.domain_layers:
            return self._model.window_states
        with self._lock:
            if identity not in self._loaded:
                self._load(identity, self._file(identity))
            return self._loaded[identity].layers

    def add(self, identity: str, file: Path) -> None:
        """Makes layers known that no domain in the catalog has yet, as long as their file is there.

        Raises:
            StoreCorruptError: the file is missing or damaged.
        """
        with self._lock:
            self._load(identity, file)

    def _load(self, identity: str, file: Path) -> None:
        assert isinstance(self._model, HierarchicalBert)  # a decoder's domains all inherit theirs
        layers = load_domain_layers(file, self._model)
        self._forget_unused()
        self._loaded[identity] = _Loaded(layers, file)

    def _file(self, identity: str) -> Path:
        for info in self._catalog.domains.values():
            if info.layers is not None and info.layer_identity == identity:
                return self._catalog.layout.resolve(info.layers.file)
        self._catalog.check_general(self._general)
        raise StoreCorruptError(
            f"{self._catalog.layout.catalog}: no domain has domain layers {identity}; run `hmi verify`"
        )

    def _forget_unused(self) -> None:
        used = {info.layer_identity for info in self._catalog.domains.values()}
        unused = {
            identity
            for identity, loaded in self._loaded.items()
            # A change that is under way has written the file, and removes it if it fails.
            if identity not in used and not loaded.file.exists()
        }
        for identity in unused & self._unused:
            del self._loaded[identity]
        self._unused = unused
