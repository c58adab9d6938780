"""Tables of a domain tree that is being changed: opened, built beside the tree, written as a generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hmi_engine.construct.build_folder import BuildFolder
from hmi_engine.construct.counting import Progress
from hmi_engine.construct.materialise import RowSources, WindowLayersOf, build_table, compute_unigrams
from hmi_engine.construct.table_plan import TablePlan, TableSettings
from hmi_engine.errors import StoreBusyError, StoreCorruptError
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.plot_table import PlotTable, open_plot, write_plot
from hmi_engine.knowledge.records import DomainInfo

__all__ = ["DomainNode", "DomainTables", "new_domain"]


@dataclass(eq=False)
class DomainNode:
    """A domain in the snapshot of a change: as it was, as it will be, and its table as it will be.

    Attributes:
        before: what the catalog had; None for a new domain.
        after: what it will have.
        table: the table as it will be; None where there is none, or it has not been opened yet.
        held: the table as it was, once it has been opened.
        is_opened: whether ``table`` is known.
        folder: holds the rows of a table that is built and not yet written.
    """

    before: DomainInfo | None
    after: DomainInfo
    table: PlotTable | None = None
    held: PlotTable | None = None
    is_opened: bool = False
    folder: BuildFolder | None = None

    def promotions(self) -> tuple[int, int]:
        """How many n-grams get a row by the change, and how many lose theirs."""
        if self.folder is None or self.table is None:
            return 0, 0
        held = torch.empty(0, dtype=torch.int64) if self.held is None else self.held.row_keys
        kept = int(torch.isin(held, self.table.row_keys, assume_unique=True).sum())
        return len(self.table.row_keys) - kept, len(held) - kept


def new_domain(name: str, number: int, parent: DomainInfo, settings: TableSettings) -> DomainInfo:
    """A domain below ``parent`` that has no table yet; ``number`` is its id and its generation."""
    return DomainInfo.without_table(
        id=number,
        name=name,
        parent_id=parent.id,
        parent=parent.name,
        generation=number,
        layer_identity=parent.layer_identity,
        min_count=settings.min_count,
        plot_bytes=settings.plot_bytes,
        row_format=settings.row_format,
    )


class DomainTables:
    """Opens, builds and writes the tables of nodes."""

    def __init__(
        self,
        catalog: Catalog,
        general: GeneralInfo,
        layers: Callable[[str], WindowLayersOf],
        *,
        progress: Progress | None,
        pause: Callable[[], None],
        batches_at_once: int,
    ) -> None:
        """Opens nothing yet.

        Args:
            catalog: of the store, open for writing.
            general: the base model of the snapshot.
            layers: gives the domain layers of an identity, which compute rows.
            progress: told about the work.
            pause: called between batches of computed rows.
            batches_at_once: from so many threads layers are called, where they run on other machines.
        """
        self._catalog = catalog
        self._general = general
        self._layers = layers
        self._progress = progress
        self._pause = pause
        self._batches_at_once = batches_at_once

    def open(self, node: DomainNode) -> PlotTable | None:
        """A node's table as it will be, read from its file where the change has not built another.

        Raises:
            StoreBusyError: someone else has replaced it meanwhile.
            StoreCorruptError: it cannot be read.
        """
        if not node.is_opened and node.after.file is not None:
            try:
                node.table = open_plot(self._catalog.layout.resolve(node.after.file), self._general)
            except StoreCorruptError as error:
                name = node.after.name
                current = self._catalog.domains.get(name)
                if current is None or current.generation != node.after.generation:
                    raise StoreBusyError(f"domain {name!r} was changed by someone else; try again") from error
                raise
            node.held = node.table
        node.is_opened = True
        return node.table

    def build(
        self, node: DomainNode, plan: TablePlan, folder: BuildFolder, *, sources: Sequence[PlotTable]
    ) -> None:
        """Builds a node's next table; its rows stay in the folder until they are written."""
        table, identity = node.table, node.after.layer_identity
        is_same = table is not None and table.metadata.layer_identity == identity
        unigrams = table.unigrams if table is not None and is_same else None
        needs_unigrams = node.after.layers is not None or node.after.parent is None
        if needs_unigrams and unigrams is None and self._general.plot_layers:
            unigrams = compute_unigrams(self._windows(identity), self._general, progress=self._progress)
        rows = RowSources(
            windows=self._windows(identity),
            tables=sources,
            codebooks=table.codebooks if table is not None and is_same else None,
            pause=self._pause,
            batches_at_once=self._batches_at_once,
        )
        node.table = build_table(
            plan, rows, folder, unigrams=unigrams if needs_unigrams else None, progress=self._progress
        )
        node.is_opened = True
        node.after = node.after.model_copy(update={"card": node.after.card | plan.statistics})

    def _windows(self, identity: str) -> Callable[[Tensor], Tensor]:
        # Looked up when it is first called: with K = 0 there are no domain layers, and no rows.
        def run(tokens: Tensor) -> Tensor:
            return self._layers(identity)(tokens)

        return run

    def write(self, node: DomainNode) -> None:
        """Writes a node's built table, if any, as its new generation; raises as ``write_plot``."""
        table = node.table
        if table is None:
            return
        (number,) = self._catalog.reserve()
        file = self._catalog.layout.plot_file(node.after.id, number)
        path = self._catalog.layout.resolve(file)
        sha256 = write_plot(path, table)
        node.after = node.after.model_copy(
            update={
                "generation": number,
                "file": file,
                "bytes": path.stat().st_size,
                "sha256": sha256,
                "rows": len(table.row_keys),
                "unigrams": table.unigrams is not None,
                "corpus_tokens": table.metadata.corpus_tokens,
                "admission_count": table.metadata.admission_count,
                "previous": node.before.plot_file() if node.before is not None else None,
            }
        )
