"""The domain layers of each identity, loaded when they are first asked for."""

from __future__ import annotations

import threading

from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.domain_layers import load_domain_layers
from hmi_engine.models.families import AnyWindowLayers, HierarchicalModel

__all__ = ["DomainLayerLibrary"]


class DomainLayerLibrary:
    """Finds layers by identity: the base model's, or those of the domain that brought its own."""

    def __init__(self, catalog: Catalog, model: HierarchicalModel, general: GeneralInfo) -> None:
        """``general`` describes ``model``."""
        self._catalog, self._general = catalog, general
        self._model = model
        self._lock = threading.Lock()
        self._loaded: dict[str, AnyWindowLayers] = {}

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
                self._loaded[identity] = self._load(identity)
            return self._loaded[identity]

    def add(self, identity: str, layers: AnyWindowLayers) -> None:
        """Makes layers known that no domain in the catalog has yet."""
        with self._lock:
            self._loaded[identity] = layers

    def _load(self, identity: str) -> AnyWindowLayers:
        for info in self._catalog.domains.values():
            if info.layers is not None and info.layer_identity == identity:
                assert isinstance(self._model, HierarchicalBert)  # a decoder's domains all inherit theirs
                return load_domain_layers(self._catalog.layout.resolve(info.layers.file), self._model)
        self._catalog.check_general(self._general)
        raise StoreCorruptError(
            f"{self._catalog.layout.catalog}: no domain has domain layers {identity}; run `hmi verify`"
        )
