"""Changes of the domain knowledge tree: planned on a snapshot, built beside it, committed in one step.

A domain's table follows from its frequencies, its budget and what its ancestors hold. So to update a domain,
to move it, or to give it other domain layers is the same: plan its table and those below it again, copy the
rows that exist, compute the others, and put all new generations in place in one transaction. Readers see the
tree before or after. The old generation's file stays, so that a repair has something to fall back to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from hmi_engine.construct.build_folder import BuildFolder
from hmi_engine.construct.counting import Progress
from hmi_engine.construct.domain_corpus import DomainCorpus
from hmi_engine.construct.domain_tables import DomainNode, DomainTables, new_domain
from hmi_engine.construct.materialise import WindowLayersOf
from hmi_engine.construct.table_plan import TablePlan, TableSettings, plan_table
from hmi_engine.errors import (
    DomainCycleError,
    DomainInUseError,
    HmiError,
    StoreBusyError,
    StoreFullError,
)
from hmi_engine.knowledge.atomic import remove_quietly
from hmi_engine.knowledge.catalog import ROOT_DOMAIN, Catalog
from hmi_engine.knowledge.frequencies import Frequencies
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.leftovers import remove_unused
from hmi_engine.knowledge.plot_table import PlotTable
from hmi_engine.knowledge.records import DomainChange, DomainInfo, StoreFile

__all__ = ["TreeChange"]


class TreeChange:
    """One change in the making. Nothing is visible, and nothing is removed, before :meth:`commit`."""

    def __init__(
        self,
        catalog: Catalog,
        layers: Callable[[str], WindowLayersOf],
        *,
        progress: Progress | None = None,
        pause: Callable[[], None] = lambda: None,
        batches_at_once: int = 1,
    ) -> None:
        """Takes a snapshot of the tree.

        Args:
            catalog: of the store, open for writing.
            layers: gives the domain layers of an identity, which compute rows.
            progress: told about the work.
            pause: called between batches of computed rows.
            batches_at_once: from so many threads layers are called, where they run on other machines.
        """
        self._catalog = catalog
        with catalog.snapshot():
            self._general = catalog.general
            self._nodes = {info.name: DomainNode(info, info) for info in catalog.domains.values()}
        self._tables = DomainTables(
            catalog,
            self._general,
            layers,
            progress=progress,
            pause=pause,
            batches_at_once=batches_at_once,
        )
        self._walked: set[str] = set()  # domains in whose tables a plan finds rows
        self._replanned: set[str] = set()
        self._written: list[str] = []

    def _node(self, name: str) -> DomainNode:
        """A domain of the snapshot; one that is gone or new is told from one that never was."""
        if name not in self._nodes:
            _ = self._catalog.domains[name]  # raises UnknownDomainError
            raise StoreBusyError(f"domain {name!r} was made just now; try again")
        return self._nodes[name]

    def info(self, name: str) -> DomainInfo:
        """A domain as the change has it: what it is planned from must not be read from the catalog again.

        Raises:
            UnknownDomainError: there is none of this name.
            StoreBusyError: it was made just now.
        """
        return self._node(name).after

    def table(self, name: str) -> PlotTable | None:
        """The domain's table as it will be, None where it has none.

        Raises:
            StoreBusyError: someone else has replaced it meanwhile.
            StoreCorruptError: it cannot be read.
        """
        return self._tables.open(self._node(name))

    def above(self, parent: str | None, identity: str) -> list[PlotTable]:
        """Tables in which a child of ``parent`` with these domain layers finds rows, nearest first.

        A plan leaves out what they hold, so nothing is committed once one of their domains has changed.
        """
        tables = []
        name = parent
        while name is not None and self._node(name).after.layer_identity == identity:
            self._walked.add(name)
            tables.append(self.table(name))
            name = self._node(name).after.parent
        return [table for table in tables if table is not None]

    def add(
        self,
        name: str,
        parent: str,
        plan: TablePlan,
        settings: TableSettings,
        folder: BuildFolder,
    ) -> None:
        """Builds a new domain's table; ``folder`` has the plan, and becomes the change's to close."""
        (number,) = self._catalog.reserve()
        identity = self._node(parent).after.layer_identity
        draft = new_domain(name, number, self._node(parent).after, settings)
        self._nodes[name] = node = DomainNode(None, draft, is_opened=True, folder=folder)
        self._tables.build(node, plan, folder, sources=self.above(parent, identity))

    def move(self, name: str, parent: str) -> None:
        """Puts a domain, with all below it, under another parent.

        Raises:
            DomainInUseError: the domain is the root.
            DomainCycleError: the parent is the domain itself or below it.
        """
        node = self._node(name)
        if node.after.parent is None:
            raise DomainInUseError(f"domain {name!r} is the root of the tree and cannot be moved")
        if parent in {below.after.name for below in self._subtree(name)}:
            raise DomainCycleError(f"domain {name!r} cannot be moved below itself ({parent!r})")
        donors = self._tables_around(name)
        above = self._node(parent).after
        node.after = node.after.model_copy(update={"parent": parent, "parent_id": above.id})
        self.refresh(name, donors=donors)

    def announce(self, file: str) -> Path:
        """The path of a file that will be written before :meth:`commit`.

        Until the change ends nobody of this process takes it for an orphan; it goes again if nothing is
        committed. Hold the catalog's ``change_lock`` while it is written, as it has another name so long.
        """
        self._written.append(file)
        self._catalog.files_in_the_making.add(file)
        return self._catalog.layout.resolve(file)

    def own_layers(self, name: str, file: str, sha256: str) -> None:
        """Gives a domain its own domain layers: an announced file that has been written."""
        path = self._catalog.layout.resolve(file)
        stored = StoreFile(file=file, bytes=path.stat().st_size, sha256=sha256)
        identity = f"{sha256[:16]}:{self._general.plot_layers}"
        node = self._node(name)
        node.after = node.after.model_copy(update={"layers": stored, "layer_identity": identity})
        self.refresh(name)

    def replace_base(self, identity: str) -> None:
        """Gives the root, and all that inherit from it, the domain layers of another base model."""
        node = self._node(ROOT_DOMAIN)
        node.after = node.after.model_copy(update={"layer_identity": identity})
        self.refresh(ROOT_DOMAIN)

    def inherit_layers(self, name: str) -> None:
        """Gives a domain its parent's domain layers."""
        node = self._node(name)
        node.after = node.after.model_copy(update={"layers": None})
        self.refresh(name)

    def inherited_indexes(self, name: str) -> list[Tensor]:
        """The indexes, int64 [C, 2], of the tables above a domain in which it finds rows."""
        after = self._node(name).after
        return [table.index for table in self.above(after.parent, after.layer_identity)]

    def promotions(self, name: str) -> tuple[int, int]:
        """How many n-grams of a domain get a row by this change, and how many lose theirs."""
        return self._node(name).promotions()

    def update(
        self,
        name: str,
        corpus: DomainCorpus,
        settings: TableSettings,
        *,
        max_promotions: int | None = None,
    ) -> None:
        """Plans a domain's table anew from other frequencies or another budget, and those below it."""
        node = self._node(name)
        node.after = node.after.model_copy(
            update={
                "plot_bytes": settings.plot_bytes,
                "min_count": settings.min_count,
                "row_format": settings.row_format,
                "card": node.after.card | {"plot_bytes": settings.plot_bytes},
            }
        )
        self.refresh(name, corpus=corpus, max_promotions=max_promotions)

    def refresh(
        self,
        name: str,
        *,
        corpus: DomainCorpus | None = None,
        donors: Sequence[PlotTable] = (),
        max_promotions: int | None = None,
    ) -> None:
        """Plans the tables of a domain and of all below it again, and builds those that change.

        Args:
            name: the domain.
            corpus: what the domain is planned from, by default what its table knows; it is then rebuilt.
            donors: further tables whose rows may be copied.
            max_promotions: how many n-grams of each table may get a row that had none.
        """
        held = [*donors, *self._tables_around(name)]
        for node in self._subtree(name):
            self._refresh_node(
                node, corpus if node.after.name == name else None, held, max_promotions=max_promotions
            )

    def _refresh_node(
        self,
        node: DomainNode,
        corpus: DomainCorpus | None,
        donors: Sequence[PlotTable],
        *,
        max_promotions: int | None,
    ) -> None:
        self._replanned.add(node.after.name)
        table = self.table(node.after.name)
        parent = node.after.parent
        if parent is not None and node.after.layers is None:
            identity = self._node(parent).after.layer_identity
            node.after = node.after.model_copy(update={"layer_identity": identity})
        if table is None and corpus is None and node.after.layers is None:
            return
        identity = node.after.layer_identity
        is_same = table is not None and table.metadata.layer_identity == identity
        above = self.above(parent, identity)
        known = corpus or (DomainCorpus.of(table) if table is not None else DomainCorpus(Frequencies.none()))
        plan = plan_table(
            known.frequencies,
            TableSettings(node.after.plot_bytes, node.after.row_format, node.after.min_count),
            self._general,
            layer_identity=identity,
            corpus_tokens=known.corpus_tokens,
            documents=known.documents,
            inherited=[other.index for other in above],
            held=table.index if table is not None else None,
            max_promotions=max_promotions,
        )
        if corpus is None and is_same and table is not None and torch.equal(plan.keys, table.row_keys):
            return
        node.folder = BuildFolder.open(self._catalog.layout, node.after.name)
        if node.folder.load(plan.fingerprint()) is None:
            node.folder.save(plan, plan.fingerprint())
        usable = [other for other in donors if other.metadata.layer_identity == identity]
        self._tables.build(node, plan, node.folder, sources=[*usable, *above])

    def _subtree(self, name: str) -> Iterator[DomainNode]:
        """The domain and all below it, each after its parent."""
        node = self._node(name)
        yield node
        for child in sorted(other for other in self._nodes if self._node(other).after.parent == name):
            yield from self._subtree(child)

    def _tables_around(self, name: str) -> list[PlotTable]:
        """The tables of a domain, of those below it and of those above it, as they are now."""
        names = [node.after.name for node in self._subtree(name)]
        parent = self._node(name).after.parent
        while parent is not None:
            names.append(parent)
            parent = self._node(parent).after.parent
        return [table for table in map(self.table, names) if table is not None]

    def commit(self, *, taken_traffic: Sequence[int] = (), general: GeneralInfo | None = None) -> None:
        """Writes what was built and puts all new states in place in one transaction, with ``general`` a base.

        Then files go that nothing refers to any more. Raises as ``write_plot`` and
        :meth:`~hmi_engine.knowledge.catalog.Catalog.commit_domains`; nothing is changed then.
        """
        built = [node for node in self._nodes.values() if node.folder is not None]
        # One lock from the first file to the commit: a repair of this process would take them for orphans.
        with self._catalog.change_lock:
            try:
                for node in built:
                    self._tables.write(node)
                self._catalog.commit_domains(
                    self._changes(),
                    unchanged=self._before(self._walked | self._replanned),
                    replanned=self._before(self._replanned),
                    taken_traffic=taken_traffic,
                    general=general,
                )
            except BaseException:
                remove_unused(self._catalog, _files_of(node.after for node in built) - self._files_before())
                raise
            for file in self._files_before() - _files_of(node.after for node in self._nodes.values()):
                remove_quietly(self._catalog.layout.resolve(file))
        for node in built:
            if node.folder is not None:
                node.folder.remove()
                node.folder = None

    def _changes(self) -> list[DomainChange]:
        return [
            DomainChange(node.before, node.after)
            for node in self._nodes.values()
            if node.before is None or node.before != node.after
        ]

    def _before(self, names: Iterable[str]) -> list[DomainInfo]:
        """Those of these domains that there were when the change began, as they were."""
        nodes = map(self._node, sorted(names))
        return [node.before for node in nodes if node.before is not None]

    def _files_before(self) -> set[str]:
        return _files_of(node.before for node in self._nodes.values() if node.before is not None)

    def __enter__(self) -> TreeChange:
        """Returns the change itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Lets go of what was not committed; after a full disk or Ctrl-C, rows are kept for the next try."""
        is_lasting = isinstance(error, HmiError) and not isinstance(error, StoreFullError)
        for node in self._nodes.values():
            if node.folder is not None:
                node.folder.remove() if is_lasting else node.folder.close()
                node.folder = None
        remove_unused(self._catalog, self._written)
        self._catalog.files_in_the_making.difference_update(self._written)


def _files_of(infos: Iterable[DomainInfo]) -> set[str]:
    """The files that domains refer to."""
    stored = (file for info in infos for file in (info.plot_file(), info.previous, info.layers))
    return {file.file for file in stored if file is not None}
