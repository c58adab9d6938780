"""A store: the general, domain and task knowledge of one base model, on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from hmi_engine.construct.counting import Progress
from hmi_engine.construct.creation import create_store
from hmi_engine.construct.joint_training import TOGETHER, TenantExamples, TrainingOutcome, train_tenants
from hmi_engine.construct.lesson import Teaching
from hmi_engine.construct.model_card import ModelCard, base_digest, make_card, read_card
from hmi_engine.construct.training import (
    SearchSpace,
    TrainedTenant,
    TrainingBase,
    TrainingProgress,
    TrainingSettings,
    train_tenant,
)
from hmi_engine.errors import HmiError, TenantExistsError
from hmi_engine.exchange_store import ExchangeStore
from hmi_engine.knowledge.adapters import Adapter
from hmi_engine.knowledge.catalog import Catalog
from hmi_engine.knowledge.catalog_views import TenantView
from hmi_engine.knowledge.changes import (
    TENANTS_PER_BATCH,
    NewTenant,
    remove_tenants,
    save_in_batches,
    save_tenants,
)
from hmi_engine.knowledge.examples import AnyExample
from hmi_engine.knowledge.heads import Head
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.names import check_name
from hmi_engine.knowledge.records import TenantInfo
from hmi_engine.knowledge.sizes import parse_bytes
from hmi_engine.knowledge.tenant_file import load_tenant
from hmi_engine.knowledge.verification import (
    Problem,
    Repair,
    collect_garbage,
    repair,
    verify,
)
from hmi_engine.memory.plots import PlotLibrary

__all__ = ["Corpus", "Store"]

Corpus = str | Path | Sequence[Path] | Iterable[str]
"""Path or paths of text files (a folder stands for its files), or texts."""


class Store(ExchangeStore, AbstractContextManager["Store"]):
    """One base model, its domain knowledge tree and its tenants. Files: docs/architecture.md."""

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        general: str | Path,
        distilled: str | Path | None = None,
        plot_layers: int | None = None,
        window: Literal[2, 3] | None = None,
        row_dtype: Literal["float16", "float32"] = "float16",
        progress: Progress | None = None,
    ) -> Store:
        """Makes a store around a base model, and computes the unigram rows of its whole vocabulary.

        Args:
            path: a folder that does not exist yet.
            general: folder or hub id of a BERT or GPT-2-class model (a hub id may be downloaded), or the
                folder of a distilled one that :meth:`distill` exported.
            distilled: file with what a distillation changed of ``general`` (``distill(compact=...)``).
            plot_layers: K, how many of the lowest layers are looked up; default what the model was distilled
                for, else half of them; 0 for none.
            window: width of the n-gram windows; default what the model was distilled for, else 2, of a
                decoder 3.
            row_dtype: type of the table's rows.
            progress: told about the work.

        Raises:
            StoreExistsError: the path exists.
            UnsupportedModelError: the model cannot be served, has too few layers, knows fewer tokens than its
                tokenizer, or was distilled for other ``plot_layers`` or ``window``.
            StoreFullError: no room; nothing is left behind.
        """
        create_store(
            Path(path),
            source=str(general),
            distilled=None if distilled is None else Path(distilled),
            plot_layers=plot_layers,
            window=window,
            row_dtype=row_dtype,
            progress=progress,
        )
        return cls.open(path)

    @classmethod
    def open(cls, path: str | Path, *, read_only: bool = False) -> Store:
        """Opens a store.

        Raises:
            StoreNotFoundError: the folder is no store.
            StoreVersionError: a newer HMI wrote it.
            StoreCorruptError: its catalog is damaged.
        """
        return cls(Catalog.open(StoreLayout(Path(path)), read_only=read_only))

    @property
    def tenants(self) -> TenantView:
        """Tenants by name: a read-only mapping that shows the current state."""
        return self.catalog.tenants

    def add_tenant(
        self,
        name: str,
        *,
        domain: str,
        adapter: Adapter,
        head: Head,
        replace: bool = False,
        card: dict[str, Any] | None = None,
        max_bytes: int | str | None = None,
    ) -> TenantInfo:
        """Adds a tenant, or with ``replace`` puts it atomically in the place of one of this name.

        Args:
            name: the tenant's name, such as ``acme/chemprot``.
            domain: name of its domain.
            adapter: its blocks on upper layers (``Adapter({})`` for a head alone).
            head: its head.
            replace: whether a tenant of this name may be replaced.
            card: JSON that is kept with it.
            max_bytes: refuse a larger file, as the smallest engine that shall serve it holds no more
                (``host_memory``); in bytes or as ``"1GiB"``.

        Raises:
            InvalidNameError, TenantExistsError, UnknownDomainError.
            InvalidAdapterError, InvalidHeadError: shapes, types or values (NaN, infinity) that do not fit,
                or a file above ``max_bytes``.
            StoreFullError: no room; the store is as it was.
        """
        self._check_writable()
        limit = None if max_bytes is None else parse_bytes(max_bytes)
        new = NewTenant(name, domain, adapter, head, card or {})
        return save_tenants(self.catalog, [new], replace=replace, max_bytes=limit)[0]

    def add_tenants(
        self,
        tenants: Iterable[NewTenant],
        *,
        replace: bool = False,
        batch: int | None = TENANTS_PER_BATCH,
        max_bytes: int | str | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Adds many tenants, drawn from ``tenants`` as they are written; each batch is one transaction.

        A batch is all or none, and on the disk before the next begins. An error leaves the batches before it
        in the store, and its message says how many tenants they are; of its own batch nothing stays.

        Args:
            tenants: each name once; one batch of them is in memory.
            replace: whether tenants of these names may be replaced.
            batch: how many in a transaction; None for all in one.
            max_bytes: as for :meth:`add_tenant`.
            progress: told how many are in the store.

        Returns:
            How many were added.

        Raises:
            ValueError: ``batch`` is below 1.
            As :meth:`add_tenant`; what ``tenants`` raises passes through.
        """
        self._check_writable()
        limit = None if max_bytes is None else parse_bytes(max_bytes)
        return save_in_batches(
            self.catalog, tenants, replace=replace, batch=batch, max_bytes=limit, progress=progress
        )

    def remove_tenant(self, name: str) -> None:
        """Removes a tenant; engines that hold it finish what runs.

        Raises:
            UnknownTenantError, ReadOnlyStoreError.
        """
        remove_tenants(self.catalog, [name])

    def remove_tenants(self, names: Iterable[str]) -> None:
        """Removes tenants in one transaction, all of them or none; raises as :meth:`remove_tenant`."""
        remove_tenants(self.catalog, names)

    def pin_tenant(self, name: str) -> TenantInfo:
        """Has every engine of the store keep a tenant in memory; who replaces it is pinned too.

        Raises:
            UnknownTenantError, ReadOnlyStoreError.
        """
        return self.catalog.pin_tenant(name, True)

    def unpin_tenant(self, name: str) -> TenantInfo:
        """Lets engines evict a tenant again; raises as :meth:`pin_tenant`."""
        return self.catalog.pin_tenant(name, False)

    def load_tenant(self, name: str) -> tuple[Adapter, Head]:
        """A tenant's adapter and head, as tensors of their own.

        Raises:
            UnknownTenantError, StoreCorruptError.
        """
        return load_tenant(self.layout.resolve(self.tenants[name].file), self.general)

    def train_tenant(
        self,
        name: str,
        examples: Sequence[AnyExample],
        *,
        domain: str,
        validation_examples: Sequence[AnyExample] = (),
        test_examples: Sequence[AnyExample] = (),
        settings: TrainingSettings | None = None,
        search_space: SearchSpace | None = None,
        teacher: str | Path | None = None,
        unlabelled: Sequence[str] = (),
        replace: bool = False,
        progress: TrainingProgress | None = None,
    ) -> TrainedTenant:
        """Trains an adapter and a head on examples of ``settings.task``, and adds the tenant.

        The base is frozen; rows are cross-fitted where the domain's table was built from the training text
        (docs/training.md). The report is kept in the tenant's card
        (:meth:`tenant_card`).

        Args:
            name: the tenant's name.
            examples: of the type that the task takes: ``Example`` for classification, ``TaggedExample`` for
                token classification, and so on.
            domain: name of its domain.
            validation_examples: those that choose the best epoch; without any, a share of ``examples`` does.
            test_examples: those that choose nothing and are only scored at the end.
            settings: of the training; default: classification with bottlenecks.
            search_space: learning rates and ranks to choose from first.
            teacher: folder of a model that was fine-tuned for the task, as transformers saves it: the tenant
                learns its answers beside the labels.
            unlabelled: texts of which the teacher alone says something.
            replace: whether a tenant of this name may be replaced.
            progress: told about each stage.

        Raises:
            TrainingDataError: too few examples or labels, or examples that do not fit the task.
            UnsupportedModelError: the teacher cannot be loaded, or has other labels.
            TrainingDivergedError, TrainingMemoryError: nothing is added.
            InvalidNameError, TenantExistsError, UnknownDomainError: before the training begins.
        """
        self._check_writable()
        self._check_new(name, replace)
        _ = self.domains[domain]
        trained = train_tenant(
            general=self.general,
            model=self.model,
            encoder=self.encoder,
            plots=self._plots(),
            domain=domain,
            examples=examples,
            validation_examples=validation_examples,
            test_examples=test_examples,
            settings=settings or TrainingSettings(),
            search_space=search_space,
            teaching=Teaching.of(teacher, unlabelled),
            progress=progress,
        )
        self._add_trained(name, domain, trained, replace)
        return trained

    def train_tenants(
        self,
        tenants: Sequence[TenantExamples],
        *,
        domain: str,
        together: int = TOGETHER,
        replace: bool = False,
        progress: TrainingProgress | None = None,
    ) -> dict[str, TrainingOutcome]:
        """Trains tenants of one domain together, each to what :meth:`train_tenant` would make of it alone.

        What is wrong with one tenant (its name, data, settings, a loss that is not finite) ends its training
        alone; the others are added, as soon as those that are trained with them are done.

        Args:
            tenants: what each is to learn; names differ.
            domain: name of their domain.
            together: how many are in memory at a time.
            replace: whether tenants of these names may be replaced.
            progress: told about each stage.

        Returns:
            For each name the trained tenant, or the error that says why there is none.

        Raises:
            UnknownDomainError, ReadOnlyStoreError, TrainingMemoryError.
            ValueError: two tenants have one name, or ``together`` is below 1.
        """
        self._check_writable()
        if len({tenant.name for tenant in tenants}) < len(tenants):
            raise ValueError("two tenants have one name")
        _ = self.domains[domain]
        outcomes: dict[str, TrainingOutcome] = {tenant.name: HmiError("not trained") for tenant in tenants}
        accepted = []
        for tenant in tenants:
            try:
                self._check_new(tenant.name, replace)
                accepted.append(tenant)
            except HmiError as error:
                outcomes[tenant.name] = error
        base = TrainingBase(self.general, self.model, self.encoder, self._plots(), domain, progress)
        for tenant, outcome in train_tenants(base, accepted, together=together):
            outcomes[tenant.name] = outcome
            if not isinstance(outcome, HmiError):
                self._add_trained(tenant.name, domain, outcome, replace)
        return outcomes

    def _plots(self) -> PlotLibrary | None:
        """The tables, if layers are looked up."""
        if not self.general.plot_layers:
            return None
        return PlotLibrary(self.layout, self.catalog, self.general, domain_layers=self.domain_layers)

    def _check_new(self, name: str, replace: bool) -> None:
        check_name(name)
        if name in self.tenants and not replace:
            raise TenantExistsError(
                f"tenant {name!r} is in {self.layout.root} already; replace it with replace=True (--replace)"
            )

    def _add_trained(self, name: str, domain: str, trained: TrainedTenant, replace: bool) -> None:
        card = make_card(
            name, domain, self.general, base_digest(self.catalog.general_files()), trained.report
        )
        self.add_tenant(
            name,
            domain=domain,
            adapter=trained.adapter,
            head=trained.head,
            replace=replace,
            card=card.model_dump(mode="json"),
        )

    def tenant_card(self, name: str) -> ModelCard | None:
        """What the training of a tenant was told and found; None where it was not trained here.

        Raises:
            UnknownTenantError.
        """
        return read_card(self.tenants[name])

    def verify(self, *, deep: bool = True, progress: Progress | None = None) -> list[Problem]:
        """Checks every file (with ``deep``, its checksum and contents) and finds what belongs to nobody.

        Others may write meanwhile; while they can, no file is said to belong to nobody.
        """
        return verify(self.layout, self.catalog, deep=deep, progress=progress)

    def collect_garbage(self, *, progress: Progress | None = None) -> list[Repair]:
        """Removes files that belong to nobody, as crashes leave them; reads no file, and costs little.

        Interrupted builds of domains stay. Returns what was removed, raises as :meth:`repair`.
        """
        return collect_garbage(self.layout, self.catalog, progress=progress)

    def repair(self, problems: Sequence[Problem]) -> list[Repair]:
        """Sets right what is repairable among ``problems``; nothing else is touched.

        Files that belong to nobody and interrupted builds are removed; a damaged table gives way to the
        generation before it, if that is sound.

        Returns:
            What was done.

        Raises:
            StoreBusyError: another process has the store open for writing.
            StoreCorruptError, ReadOnlyStoreError.
        """
        return repair(self.layout, self.catalog, problems)

    def close(self) -> None:
        """Closes the catalog; a second call does nothing."""
        self.catalog.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the store."""
        self.close()
