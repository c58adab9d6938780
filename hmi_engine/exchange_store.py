"""A store's exchange with other libraries: tenants that come in from their folders, and go out as such."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch

from hmi_engine.distilling_store import DistillingStore
from hmi_engine.errors import InvalidAdapterError, InvalidHeadError
from hmi_engine.interop import (
    ImportedTenant,
    LowerLayers,
    ProblemType,
    detect_format,
    read_adapterhub,
    read_head,
    read_peft,
    write_adapterhub,
    write_peft,
)
from hmi_engine.knowledge.adapters import Adapter
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.knowledge.changes import NewTenant, save_tenants
from hmi_engine.knowledge.heads import Head
from hmi_engine.models.bert_loading import load_bert_configuration, load_bert_tensors
from hmi_engine.models.gpt2_loading import load_gpt2_configuration, load_gpt2_tensors

__all__ = ["ExchangeStore"]


class ExchangeStore(DistillingStore):
    """What :class:`~hmi_engine.store.Store` imports and exports."""

    @abstractmethod
    def load_tenant(self, name: str) -> tuple[Adapter, Head]:
        """A tenant's adapter and head."""

    def import_adapter(
        self,
        directory: str | Path,
        *,
        tenant: str,
        domain: str = ROOT_DOMAIN,
        head: str | Path | Head | None = None,
        labels: Sequence[str] | None = None,
        problem_type: ProblemType | None = None,
        lower_layers: LowerLayers = "error",
        replace: bool = False,
    ) -> ImportedTenant:
        """Adds a tenant from a folder that PEFT or AdapterHub's `adapters` library saved.

        Its files tell which of both it was. Which kinds and settings: docs/adapters.md.

        Args:
            directory: holds ``adapter_config.json`` and a safetensors file.
            tenant: name of the new tenant.
            domain: its domain.
            head: a head in place of the folder's, or the folder of one that the `adapters` library saved.
            labels: names of the classes; by default the folder's, else ``LABEL_0``, ...
            problem_type: what a sequence head's numbers mean, in transformers' words; by default what the
                folder says, else one number is regression and several are classes of which one holds.
            lower_layers: what to do with blocks below the store's K: refuse, or leave out (recorded).
            replace: whether a tenant of this name may be replaced.

        Raises:
            InvalidAdapterError, InvalidHeadError: what cannot be served, with the way out.
            InvalidNameError, TenantExistsError, UnknownDomainError.
        """
        folder = Path(directory)
        importer = self.import_peft if detect_format(folder) == "peft" else self.import_adapterhub
        return importer(
            folder,
            tenant=tenant,
            domain=domain,
            head=head,
            labels=labels,
            problem_type=problem_type,
            lower_layers=lower_layers,
            replace=replace,
        )

    def import_peft(
        self,
        directory: str | Path,
        *,
        tenant: str,
        domain: str = ROOT_DOMAIN,
        head: str | Path | Head | None = None,
        labels: Sequence[str] | None = None,
        problem_type: ProblemType | None = None,
        lower_layers: LowerLayers = "error",
        replace: bool = False,
    ) -> ImportedTenant:
        """Adds a tenant from a folder that PEFT saved (LoRA, IA3, trained biases; a classifier).

        For a decoder: of ``GPT2LMHeadModel``, which then generates, or ``GPT2ForSequenceClassification``.
        Arguments and errors are those of :meth:`import_adapter`. PEFT keeps neither the names of the classes
        nor a ``problem_type``.
        """
        imported = read_peft(
            directory,
            self.general,
            base=lambda: self._base_tensors,
            head=read_head(Path(head)) if isinstance(head, str | Path) else head,
            labels=labels,
            problem_type=problem_type,
            lower_layers=lower_layers,
        )
        name = "score" if self.general.is_causal else "classifier"
        way_out = f"save it with PEFT's modules_to_save=['{name}'], or pass head="
        return self._add_imported(imported, tenant, domain, f"{directory} has no {name}: {way_out}", replace)

    def import_adapterhub(
        self,
        directory: str | Path,
        *,
        tenant: str,
        domain: str = ROOT_DOMAIN,
        head: str | Path | Head | None = None,
        labels: Sequence[str] | None = None,
        problem_type: ProblemType | None = None,
        lower_layers: LowerLayers = "error",
        replace: bool = False,
    ) -> ImportedTenant:
        """Adds a tenant from a folder that AdapterHub's `adapters` library saved.

        That is a bottleneck adapter, LoRA, IA3 or a union of these, and a head (``save_adapter`` with
        ``use_safetensors=True``). Arguments and errors are those of :meth:`import_adapter`.
        """
        self._check_encoder("AdapterHub's format", "import a PEFT folder (import_peft)")
        imported = read_adapterhub(
            directory,
            self.general,
            head=head,
            labels=labels,
            problem_type=problem_type,
            lower_layers=lower_layers,
        )
        way_out = "pass head=, a head or the folder where save_head put one"
        return self._add_imported(imported, tenant, domain, f"{directory} has no head: {way_out}", replace)

    def _add_imported(
        self, imported: ImportedTenant, tenant: str, domain: str, no_head: str, replace: bool
    ) -> ImportedTenant:
        if imported.head is None:
            raise InvalidHeadError(no_head)
        card = {
            "imported": imported.format,
            "dropped": list(imported.dropped),
            "warnings": list(imported.warnings),
        }
        self._check_writable()
        new = NewTenant(tenant, domain, imported.adapter, imported.head, card)
        save_tenants(self.catalog, [new], replace=replace)
        return imported

    def export_peft(self, name: str, directory: str | Path, *, with_head: bool = True) -> None:
        """Writes a tenant of LoRA blocks and biases, or of scales, as a folder that PEFT loads.

        Args:
            name: the tenant.
            directory: made if missing; PEFT's two files in it are replaced.
            with_head: whether the head goes with it, as PEFT's ``classifier``.

        Raises:
            UnknownTenantError: no such tenant.
            InvalidAdapterError, InvalidHeadError: what one PEFT folder cannot express, with the way out.
            StoreBusyError: another export writes into the folder.
        """
        self._check_encoder("export to PEFT's format", "keep the folder that the tenant was imported from")
        adapter, head = self.load_tenant(name)
        write_peft(
            directory,
            adapter,
            head if with_head else None,
            self.general,
            base_model=self.general.source,
            base=lambda: self._base_tensors,
        )

    def export_adapterhub(self, name: str, directory: str | Path, *, with_head: bool = True) -> None:
        """Writes a tenant of bottlenecks, LoRA blocks and scales as a folder that AdapterHub loads.

        Args:
            name: the tenant.
            directory: made if missing; the library's four files in it are replaced.
            with_head: whether the head goes with it; if not, a head that lies there is removed.

        Raises:
            UnknownTenantError: no such tenant.
            InvalidAdapterError, InvalidHeadError: what such a folder cannot express, with the way out.
            StoreBusyError: another export writes into the folder.
        """
        self._check_encoder("AdapterHub's format", "keep the folder that the tenant was imported from")
        adapter, head = self.load_tenant(name)
        write_adapterhub(
            directory, adapter, head if with_head else None, self.general, base_model=self.general.source
        )

    def _check_encoder(self, feature: str, way_out: str) -> None:
        if self.general.is_causal:
            raise InvalidAdapterError(
                f"{feature} is for encoders, and {self.general.source} is a decoder: {way_out}"
            )

    @functools.cached_property
    def _base_tensors(self) -> dict[str, torch.Tensor]:
        if self.general.is_causal:
            return load_gpt2_tensors(self.general_folder, load_gpt2_configuration(self.general_folder))
        return load_bert_tensors(self.general_folder, load_bert_configuration(self.general_folder))
