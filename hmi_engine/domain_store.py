"""The domain knowledge tree of a store: adding, updating, moving and removing domains."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hmi_engine.construct.build_folder import BuildFolder
from hmi_engine.construct.counting import Progress
from hmi_engine.construct.domain_corpus import CorpusSource, DomainCorpus, count_source, plan_domain
from hmi_engine.construct.domain_tree import TreeChange
from hmi_engine.construct.ray_cluster import open_cluster
from hmi_engine.construct.ray_counting import count_on_ray
from hmi_engine.construct.table_plan import TableSettings, largest_useful_count
from hmi_engine.errors import (
    DomainExistsError,
    ReadOnlyStoreError,
    UnsupportedModelError,
)
from hmi_engine.knowledge.catalog import ROOT_DOMAIN, Catalog
from hmi_engine.knowledge.catalog_views import DomainView
from hmi_engine.knowledge.changes import remove_domain, save_traffic
from hmi_engine.knowledge.corpus import Corpus, CorpusReport
from hmi_engine.knowledge.frequencies import DEFAULT_HALF_LIFE_TOKENS, Frequencies
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.names import check_name
from hmi_engine.knowledge.records import TrafficInfo
from hmi_engine.knowledge.row_formats import RowFormat
from hmi_engine.knowledge.sizes import parse_bytes
from hmi_engine.knowledge.tensor_file import write_tensors
from hmi_engine.knowledge.traffic_file import TrafficCounts, read_traffic
from hmi_engine.memory.domain_layers import DomainLayerLibrary
from hmi_engine.models.bert import HierarchicalBert
from hmi_engine.models.domain_layers import checked_domain_layers
from hmi_engine.models.families import HierarchicalModel, load_model
from hmi_engine.models.gpt2 import HierarchicalGpt2
from hmi_engine.models.tokenization import TextEncoder

__all__ = ["DEFAULT_MAX_PROMOTIONS", "DomainStore", "DomainUpdate"]

DEFAULT_MAX_PROMOTIONS = 16384
"""N-grams of each table that one update by traffic gives a row: about ten seconds of two cores."""


@dataclass(frozen=True)
class DomainUpdate:
    """What an update did to the domain's own table.

    Attributes:
        generation: of its table now; the same as before where nothing changed.
        rows: it has now.
        promoted: n-grams that got a row.
        demoted: n-grams that lost theirs, to rarer use or to an ancestor.
        traffic_tokens: tokens of traffic that were taken in.
        corpus: what was read of new text.
    """

    generation: int
    rows: int
    promoted: int
    demoted: int
    traffic_tokens: int
    corpus: CorpusReport


class DomainStore:
    """The part of :class:`~hmi_engine.Store` that knows of domains."""

    def __init__(self, catalog: Catalog) -> None:
        """Use ``Store.create`` or ``Store.open``."""
        self.catalog = catalog
        self.layout: StoreLayout = catalog.layout
        self.general: GeneralInfo = catalog.general
        catalog.expected_general = self.general

    @property
    def general_folder(self) -> Path:
        """Folder of the base model."""
        return self.layout.general_folder(self.general.folder)

    @property
    def domains(self) -> DomainView:
        """Domains by name: a read-only mapping that shows the current state."""
        return self.catalog.domains

    @functools.cached_property
    def any_model(self) -> HierarchicalModel:
        """The base model of whatever architecture; raises :class:`GeneralChangedError` if it is gone."""
        self.catalog.check_general(self.general)
        return load_model(self.general_folder, self.general.plot_layers, is_causal=self.general.is_causal)

    @property
    def model(self) -> HierarchicalBert:
        """The base model, an encoder, loaded at first use.

        Raises:
            GeneralChangedError: it is gone.
            UnsupportedModelError: it is a decoder.
        """
        if isinstance(self.any_model, HierarchicalBert):
            return self.any_model
        raise UnsupportedModelError(
            f"{self.layout.root} is a store of decoders ({self.general.source}); this is for encoders alone"
        )

    @property
    def decoder(self) -> HierarchicalGpt2:
        """The base model, a decoder, loaded at first use; raises as :attr:`model`, for an encoder."""
        if isinstance(self.any_model, HierarchicalGpt2):
            return self.any_model
        raise UnsupportedModelError(
            f"{self.layout.root} is a store of encoders ({self.general.source}); this is for decoders alone"
        )

    @functools.cached_property
    def encoder(self) -> TextEncoder:
        """The base model's tokenizer, loaded at first use; raises as :attr:`model`."""
        self.catalog.check_general(self.general)
        return TextEncoder(self.general_folder, self.general.max_positions)

    @functools.cached_property
    def domain_layers(self) -> DomainLayerLibrary:
        """The domain layers by identity, loaded at first use."""
        return DomainLayerLibrary(self.catalog, self.any_model, self.general)

    def add_domain(
        self,
        name: str,
        corpus: Corpus,
        *,
        parent: str = ROOT_DOMAIN,
        plot_bytes: int | str = "256MiB",
        min_count: int = 2,
        row_format: RowFormat | None = None,
        text_field: str = "text",
        stdin_format: Literal["txt", "jsonl"] = "txt",
        count_memory: int | str = "1GiB",
        scratch: str | Path | None = None,
        ray: str | None = None,
        progress: Progress | None = None,
    ) -> CorpusReport:
        """Adds a domain: counts the corpus' n-grams and materialises the most frequent into its PLOT.

        An addition that was interrupted goes on where it was if it is asked for again with the same files
        and settings.

        Args:
            name: the domain's name.
            corpus: path(s) of .txt, .jsonl (also .gz, .zst) or .parquet files or of folders of them, ``"-"``
                for standard input, or an iterable of texts; streamed.
            parent: name of the parent domain; n-grams that an ancestor's table holds are not stored again.
            plot_bytes: budget for the table, in bytes or as ``"256MiB"``.
            min_count: n-grams seen less often get no row.
            row_format: how rows are stored (:mod:`hmi_engine.knowledge.row_formats`), by default as floats
                of the store's ``row_dtype``. The others are smaller and not exact.
            text_field: field of the text in JSON lines, column in Parquet files.
            stdin_format: what standard input is.
            count_memory: budget for counts in memory; beyond, they go to files and are merged by DuckDB.
            scratch: folder for those files, by default the system's.
            ray: address of a Ray cluster that counts and computes, as
                :func:`~hmi_engine.construct.ray_cluster.open_cluster` takes it; its machines must see the
                corpus' files. None for this machine alone.
            progress: told about the work.

        Returns:
            What was read, and which lines were no text (they are left out).

        Raises:
            InvalidNameError, DomainExistsError, UnknownDomainError: the name or the parent's.
            CorpusError: a path cannot be read, or there is no text at all.
            BudgetTooSmallError: the budget is not 0, and not enough for one row.
            StoreFullError: no room; what is done is kept for the next try.
            StoreBusyError: someone else is building this domain.
            MissingDependencyError, ClusterError: Ray is not installed, or not at this address.
        """
        check_name(name, "domain")
        self._check_writable()
        if name in self.domains:
            raise DomainExistsError(
                f"domain {name!r} is in {self.layout.root} already; remove it first, or update it"
            )
        if ray is not None and self.general.is_causal:
            raise UnsupportedModelError("Ray builds the domains of encoders alone; leave it out")
        _ = self.domains[parent]
        settings = self._settings(plot_bytes, row_format, min_count)
        source = CorpusSource(
            corpus,
            text_field=text_field,
            stdin_format=stdin_format,
            count_memory=parse_bytes(count_memory),
            scratch=Path(scratch) if scratch is not None else None,
        )
        with (
            open_cluster(ray, self.catalog) as cluster,
            TreeChange(
                self.catalog,
                cluster.layers if cluster else self.domain_layers,
                progress=progress,
                batches_at_once=cluster.num_workers if cluster else 1,
            ) as change,
            BuildFolder.open(self.layout, name) as folder,
        ):
            identity = change.info(parent).layer_identity
            plan = plan_domain(
                source,
                self.encoder,
                self.general,
                settings,
                folder,
                layer_identity=identity,
                above=change.above(parent, identity),
                progress=progress,
                count=count_on_ray if cluster else count_source,
            )
            change.add(name, parent, plan, settings, folder)
            change.commit()
        return source.report

    def update_domain(
        self,
        name: str,
        corpus: Corpus | None = None,
        *,
        plot_bytes: int | str | None = None,
        half_life_tokens: float = DEFAULT_HALF_LIFE_TOKENS,
        max_promotions: int | None = None,
        max_share: float = 1.0,
        text_field: str = "text",
        stdin_format: Literal["txt", "jsonl"] = "txt",
        progress: Progress | None = None,
    ) -> DomainUpdate:
        """Brings a domain's table up to date with new text, or with the traffic that engines saw.

        N-grams that are frequent now get a row, the least frequent lose theirs, under the budget. Readers
        keep the old table until they are done with it. Tables below are brought in line.

        Args:
            name: the domain.
            corpus: new text, as in :meth:`add_domain`; None for traffic.
            plot_bytes: a new budget; None keeps the present one.
            half_life_tokens: tokens of the domain's traffic after which what was counted before weighs half.
            max_promotions: how many n-grams of each table may get a row; by default all that earned one
                from text, :data:`DEFAULT_MAX_PROMOTIONS` from traffic. The rest get theirs next time.
            max_share: share of the time that computing rows may take; the rest is left to other work.
            text_field: field of the text in JSON lines.
            stdin_format: what standard input is.
            progress: told about the work.

        Raises:
            UnknownDomainError, CorpusError, BudgetTooSmallError, StoreFullError.
            StoreBusyError: someone else is changing this part of the tree; nothing was changed.
        """
        self._check_writable()
        _ = self.domains[name]
        source = CorpusSource(corpus or (), text_field=text_field, stdin_format=stdin_format)
        pause = _pauses(max_share)
        with TreeChange(self.catalog, self.domain_layers, progress=progress, pause=pause) as change:
            info = change.info(name)
            budget = info.plot_bytes if plot_bytes is None else plot_bytes
            settings = self._settings(budget, info.row_format, max(1, info.min_count))
            table = change.table(name)
            known = DomainCorpus(Frequencies.none()) if table is None else DomainCorpus.of(table)
            taken: list[TrafficInfo] = []
            if corpus is None:
                taken = [file for file in self.catalog.traffic_files() if file.domain_id == info.id]
                known = known.with_traffic(self._read_traffic(taken), half_life_tokens)
                max_promotions = DEFAULT_MAX_PROMOTIONS if max_promotions is None else max_promotions
            else:
                counts = count_source(
                    source,
                    self.encoder,
                    self.general,
                    max_ngrams=largest_useful_count(settings, self.general, change.inherited_indexes(name)),
                    progress=progress,
                )
                known = known.with_corpus(counts)
            change.update(name, known, settings, max_promotions=max_promotions)
            promoted, demoted = change.promotions(name)
            change.commit(taken_traffic=[file.id for file in taken])
        for file in taken:
            self.layout.resolve(file.file).unlink(missing_ok=True)
        after = self.domains[name]
        tokens = sum(file.tokens for file in taken)
        return DomainUpdate(after.generation, after.rows, promoted, demoted, tokens, source.report)

    def move_domain(self, name: str, parent: str, *, progress: Progress | None = None) -> None:
        """Puts a domain, with all below it, under another parent.

        Rows that the new ancestors hold are dropped, rows that only the old ones held are copied, and all
        are computed anew where the domain layers differ.

        Raises:
            UnknownDomainError: no such domain or parent.
            DomainInUseError: the domain is the root.
            DomainCycleError: the parent is the domain itself or below it.
            StoreBusyError: someone else is changing this part of the tree; nothing was changed.
        """
        self._check_writable()
        for known in (name, parent):
            _ = self.domains[known]
        with TreeChange(self.catalog, self.domain_layers, progress=progress) as change:
            change.move(name, parent)
            change.commit()

    def set_domain_layers(
        self, name: str, layers: str | Path | Mapping[str, Tensor] | None, *, progress: Progress | None = None
    ) -> None:
        """Gives a domain its own domain layers, such as distilled ones; those below it inherit them.

        Exactly the rows that the old layers had computed are computed anew: the domain's, and those of the
        domains below it that have no layers of their own.

        Args:
            name: the domain, not the root, whose layers are the base model's.
            layers: a safetensors file or tensors under transformers' names, of which layers 0 to K-1 are
                taken; None gives the domain its parent's layers back.
            progress: told about the work.

        Raises:
            UnknownDomainError, StoreBusyError, StoreFullError.
            UnsupportedModelError: the domain is the root, or the tensors are not those of K such layers.
        """
        self._check_writable()
        if not self.general.plot_layers:
            raise UnsupportedModelError(
                f"{self.layout.root} has no domain layers (plot_layers is 0), so no domain can have its own"
            )
        if self.domains[name].parent is None:
            raise UnsupportedModelError(
                f"domain {name!r} is the root, whose layers are the base model's; give others to one below"
            )
        with TreeChange(self.catalog, self.domain_layers, progress=progress) as change:
            if layers is None:
                change.inherit_layers(name)
            else:
                tensors = layers if isinstance(layers, Mapping) else _read_layers(Path(layers))
                change.own_layers(name, *self._save_layers(change, name, tensors))
            change.commit()

    def _save_layers(self, change: TreeChange, name: str, tensors: Mapping[str, Tensor]) -> tuple[str, str]:
        """Writes the layers' file; returns its relative path and SHA-256, and makes the layers known."""
        checked = checked_domain_layers(tensors, self.general_folder, self.model)
        (number,) = self.catalog.reserve()
        file = self.layout.layers_file(change.info(name).id, number)
        with self.catalog.change_lock:
            path = change.announce(file)
            sha256 = write_tensors(path, checked, {"format": "hmi-domain-layers"})
        identity = f"{sha256[:16]}:{self.general.plot_layers}"
        self.domain_layers.add(identity, path)
        return file, sha256

    def save_traffic(self, domain: str, counts: TrafficCounts) -> None:
        """Keeps n-grams that an engine saw in a domain's traffic, for the next update.

        Raises:
            UnknownDomainError, ReadOnlyStoreError, StoreFullError.
        """
        self._check_writable()
        save_traffic(self.catalog, domain, counts)

    def _read_traffic(self, files: list[TrafficInfo]) -> list[TrafficCounts]:
        return [read_traffic(self.layout.resolve(file.file)) for file in files]

    def remove_domain(self, name: str) -> None:
        """Removes a domain without tenants and children.

        Raises:
            UnknownDomainError, DomainInUseError, ReadOnlyStoreError.
        """
        remove_domain(self.catalog, name)

    def _settings(self, plot_bytes: int | str, row_format: RowFormat | None, min_count: int) -> TableSettings:
        # With K = 0 nothing is looked up: the domain is a name for its tenants, and no rows are kept.
        budget = parse_bytes(plot_bytes) if self.general.plot_layers else 0
        return TableSettings(budget, row_format or self.general.row_dtype, min_count)

    def _check_writable(self) -> None:
        if self.catalog.read_only:
            raise ReadOnlyStoreError(
                f"{self.layout.root} was opened with read_only=True; open it for writing"
            )
        self.catalog.check_general(self.general)


def _read_layers(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UnsupportedModelError(f"{path}: no safetensors file: {error}") from error


def _pauses(max_share: float) -> Callable[[], None]:
    """A function that sleeps between two pieces of work, so that work takes ``max_share`` of the time."""
    if not 0 < max_share <= 1:
        raise ValueError(f"max_share is {max_share}, must be above 0 and at most 1")
    resumed = time.perf_counter()

    def pause() -> None:
        nonlocal resumed
        time.sleep((time.perf_counter() - resumed) * (1 / max_share - 1))
        resumed = time.perf_counter()

    return pause
