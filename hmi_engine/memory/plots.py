"""The PLOT tables of a store, open for lookup: one consistent state of the domain tree for each reader."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hmi_engine.errors import HmiError, StoreBusyError, StoreCorruptError
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.inheritance import inheritance_chain
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.plot_table import PlotTable, open_plot
from hmi_engine.knowledge.records import DomainInfo
from hmi_engine.memory.overlay import WindowOverlay
from hmi_engine.memory.plot_view import DomainLayers, PlotView, SearchedDomain

__all__ = ["DEFAULT_OVERLAY_BYTES", "PlotLibrary"]

DEFAULT_OVERLAY_BYTES = 256 << 20
_MOST_ATTEMPTS = 100


@dataclass(frozen=True)
class _Tree:
    """The domain tree at one version of the catalog, with the tables that have been opened so far.

    ``tables`` and ``searched`` are filled as they are asked for, under the library's lock.
    """

    version: tuple[int, int]
    domains: dict[str, DomainInfo]
    tables: dict[str, PlotTable]
    searched: dict[str, SearchedDomain]


class PlotLibrary:
    """Opens tables at first use, and lends them out; safe to use from many threads.

    A reader (:meth:`reading`) keeps the tables that it began with. When the store changes, the next one gets
    the new state; a table that no domain refers to any more is closed, and its file's mapping goes, when the
    last reader that holds it is done. Nobody waits: a reader does not hold up a change, nor a change a
    reader. Tables are known by file, and a file's name is never given twice: a domain that was removed and
    made again under the same name has another table.
    """

    def __init__(
        self,
        layout: StoreLayout,
        catalog: Catalog,
        general: GeneralInfo,
        *,
        overlay_bytes: int = DEFAULT_OVERLAY_BYTES,
        domain_layers: Callable[[str], DomainLayers] | None = None,
    ) -> None:
        """Nothing is read yet.

        Args:
            layout: where the store's files are.
            catalog: the store's catalog, which stays the caller's to close.
            general: the store's base model.
            overlay_bytes: memory for the rows of windows computed in traffic.
            domain_layers: gives the layers of an identity that is not the general knowledge's own.
        """
        self._layout = layout
        self._catalog = catalog
        self._general = general
        self._domain_layers = domain_layers
        dtype = getattr(torch, general.row_dtype)
        self.overlay = WindowOverlay(overlay_bytes, general.row_slots, general.hidden_size, dtype)
        self._lock = threading.Lock()
        self._tree: _Tree | None = None

    @property
    def version(self) -> tuple[int, int]:
        """What changes with every change of the store: without one, :meth:`reading` gives the same."""
        return self._catalog.version

    def reading(self, domains: Sequence[str]) -> PlotView:
        """Opens the tables of some domains and of their ancestors, all in the state of one moment.

        Args:
            domains: names; equal ones count once.

        Returns:
            A lease: release it, best by a with-statement.

        Raises:
            UnknownDomainError: no such domain.
            StoreCorruptError: a table cannot be read.
            GeneralChangedError: the base model has been replaced.
            StoreBusyError: the store never stays as it is for long enough.
        """
        view, failed = self.reading_each(domains)
        for error in failed.values():
            view.release()
            raise error
        return view

    def reading_each(
        self, domains: Sequence[str], *, before: PlotView | None = None
    ) -> tuple[PlotView, dict[str, HmiError]]:
        """As :meth:`reading`, but a domain that cannot be read keeps nobody from reading the others.

        Args:
            domains: names; equal ones count once.
            before: an open lease. What it has of domains that were removed meanwhile is leased once more.

        Returns:
            A lease on the domains that can be read, and by the name of each of the others its error, as
            :meth:`reading` raises it.

        Raises:
            GeneralChangedError, StoreBusyError: as :meth:`reading`.
        """
        removed = {} if before is None else before.searched
        for _ in range(_MOST_ATTEMPTS):
            tree = self._current_tree()
            searched: dict[str, SearchedDomain] = {}
            failed: dict[str, HmiError] = {}
            for name in dict.fromkeys(domains):
                if name in removed and name not in tree.domains:
                    searched[name] = removed[name]
                    continue
                try:
                    searched[name] = self._search(tree, name)
                except HmiError as error:
                    # Its frames would keep tables open for as long as somebody keeps the error.
                    failed[name] = error.with_traceback(None)
            # Since the tree was read, a domain may have been added, or a table replaced and its file removed.
            if not failed or self._catalog.version == tree.version:
                return PlotView(self._general, searched, self.overlay, self._domain_layers), failed
        raise StoreBusyError(
            f"{self._layout.root} changed {_MOST_ATTEMPTS} times while its tables were opened; try again"
        )

    def close(self) -> None:
        """Lets go of all tables and computed rows; open leases keep theirs until they are released."""
        with self._lock:
            self._tree = None
        self.overlay.clear()

    def _current_tree(self) -> _Tree:
        version = self._catalog.version
        with self._lock:
            tree = self._tree
        if tree is not None and tree.version == version:
            return tree
        # Not read until it stays the same: on a read-only disk SQLite gives every reading another version.
        with self._catalog.snapshot():
            version = self._catalog.version
            self._catalog.check_general(self._general)
            domains = {info.name: info for info in self._catalog.domains.values()}
        return self._replace_tree(version, domains)

    def _replace_tree(self, version: tuple[int, int], domains: dict[str, DomainInfo]) -> _Tree:
        files = {info.file for info in domains.values()}
        with self._lock:
            opened = {} if self._tree is None else self._tree.tables
            kept = {file: table for file, table in opened.items() if file in files}
            self._tree = _Tree(version, domains, kept, {})
            return self._tree

    def _search(self, tree: _Tree, name: str) -> SearchedDomain:
        if name not in tree.domains:
            _ = self._catalog.domains[name]  # raises UnknownDomainError
            raise StoreBusyError(f"domain {name!r} was added after the tree of domains was read; try again")
        if name not in tree.searched:
            nodes = inheritance_chain(name, tree.domains.__getitem__)
            tables = {node.name: self._open(tree, node.file) for node in nodes if node.file}
            unigrams = [table.unigrams for table in tables.values() if table.unigrams is not None]
            if not unigrams:
                raise StoreCorruptError(
                    f"domain {name!r} has no unigram table on its way to the root; run `hmi verify`"
                )
            searched = SearchedDomain(
                identity=nodes[0].layer_identity,
                names=tuple(node.name for node in nodes),
                tables=tables,
                unigrams=unigrams[0],
            )
            with self._lock:
                tree.searched[name] = searched
        return tree.searched[name]

    def _open(self, tree: _Tree, file: str) -> PlotTable:
        with self._lock:
            table = tree.tables.get(file)
        if table is None:
            opened = open_plot(self._layout.resolve(file), self._general)
            with self._lock:  # another thread may have been faster: all are to share one mapping
                table = tree.tables.setdefault(file, opened)
        return table
