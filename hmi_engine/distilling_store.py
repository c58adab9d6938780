"""A store's distillation: its base model, or a domain's layers, in hierarchical form."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from hmi_engine.construct.distillation import distil
from hmi_engine.construct.distillation_settings import (
    DistillationProgress,
    DistillationReport,
    DistillationSettings,
)
from hmi_engine.construct.distilled_model import (
    DistilledModel,
    check_compact_fits,
    check_new_folder,
    check_writable,
    read_distillation,
    weights_sha256,
    write_compact,
    write_folder,
)
from hmi_engine.construct.general_change import replace_general
from hmi_engine.construct.ray_rows import layer_tensors
from hmi_engine.domain_store import DomainStore
from hmi_engine.errors import StoreExistsError, UnsupportedModelError
from hmi_engine.knowledge.catalog import ROOT_DOMAIN
from hmi_engine.knowledge.corpus import Corpus, CorpusReport, check_not_empty, stream_texts
from hmi_engine.models.bert_loading import import_bert, load_bert_configuration, load_bert_tensors

__all__ = ["DistillingStore"]

_OF_THE_BASE = ("any_model", "encoder", "domain_layers", "_base_tensors")
"""What a store has loaded of its base model."""


class DistillingStore(DomainStore):
    """What :class:`~hmi_engine.store.Store` distils."""

    def distill(
        self,
        corpus: Corpus,
        *,
        domain: str | None = None,
        settings: DistillationSettings | None = None,
        teacher: str | Path | None = None,
        folder: str | Path | None = None,
        export: str | Path | None = None,
        compact: str | Path | None = None,
        text_field: str = "text",
        stdin_format: Literal["txt", "jsonl"] = "txt",
        report: CorpusReport | None = None,
        progress: DistillationProgress | None = None,
    ) -> DistillationReport:
        """Distils the base model into hierarchical form on unlabelled text, or a domain's own layers.

        The result takes the place of the base model, or of the domain's layers, and the rows that the old
        layers had computed are computed anew, all in one step: see docs/distillation.md.

        Args:
            corpus: text, as in :meth:`add_domain`.
            domain: learn domain layers for this domain and those below it only; the base model stays.
            settings: of the training. With ``domain`` only ``stage_1`` counts, and only domain layers learn.
            teacher: folder or hub id of the model to learn from: by default the store's base model, or, if
                that is distilled already, the one that it came from.
            folder: for checkpoints; a distillation that was interrupted goes on from there.
            export: a new folder that gets the distilled model, for :meth:`Store.create`; it is removed where
                the store then cannot take the model.
            compact: a file that gets what distillation changed, for ``Store.create(distilled=...)``; not
                from a ``teacher`` with other embeddings than the store's base.
            text_field: field of the text in JSON lines, column in Parquet files.
            stdin_format: what standard input is.
            report: counts what is read, and holds the lines that are left out.
            progress: told about the work.

        Raises:
            GeneralInUseError: the store has tenants, whose adapters fit its present base model (not with
                ``domain``).
            UnsupportedModelError: the store has no domain layers, ``domain`` is the root or stage 1 has no
                steps for it, or the teacher is not of the base model's sizes, or not the one that it was
                distilled from, or, with ``compact``, has other embeddings.
            StoreExistsError: ``export`` holds something, or ``compact`` is a folder.
            StoreError: ``export`` or ``compact`` cannot be written.
            UnknownDomainError, CorpusError, CheckpointError, TrainingDivergedError, TrainingMemoryError.
            StoreFullError: no room; the store is as it was, and checkpoints stay.
            StoreBusyError: someone else changed the store meanwhile; checkpoints stay.
            MissingDependencyError: ``accelerate`` is not installed.
        """
        self._check_writable()
        _ = self.model  # an encoder
        chosen = settings or DistillationSettings()
        layers = None
        if export is not None:
            check_new_folder(Path(export))
            check_writable(Path(export))
        if compact is not None:
            _check_compact_file(Path(compact), export, folder)
        if domain is None:
            self.catalog.check_no_tenants()
        elif export is not None or compact is not None:
            raise UnsupportedModelError(
                f"export and compact are for a base model; domain {domain!r} keeps its layers in the store"
            )
        else:
            chosen, layers = chosen.for_domain(), self._layers_of(domain)
        with self._teacher_folder(teacher) as teaching:
            if compact is not None:
                check_compact_fits(_weights(self.general_folder), _weights(teaching))
            distilled = distil(
                _texts(corpus, text_field, stdin_format, CorpusReport() if report is None else report),
                base=self.general_folder,
                teacher=teaching,
                general=self.general,
                encoder=self.encoder,
                settings=chosen,
                domain=domain,
                domain_layers=layers,
                folder=None if folder is None else Path(folder),
                progress=progress,
            )
            if export is not None:
                write_folder(Path(export), self.general_folder, distilled)
            with self._removed_if_nothing_changes(export):
                if compact is not None:
                    write_compact(Path(compact), _weights(teaching), distilled)
                self._install(distilled, domain, progress)
        return distilled.report

    @contextmanager
    def _removed_if_nothing_changes(self, export: str | Path | None) -> Iterator[None]:
        """An error that leaves the store as it was leaves no export: the same call may come again."""
        before = self.general.folder
        try:
            yield
        except BaseException:
            if export is not None and self.catalog.general.folder == before:
                shutil.rmtree(export, ignore_errors=True)
            raise

    def _install(
        self, distilled: DistilledModel, domain: str | None, progress: DistillationProgress | None
    ) -> None:
        if domain is not None:
            self.set_domain_layers(domain, distilled.layers, progress=progress)
            return
        self.general = replace_general(self.catalog, distilled, progress=progress)
        self.catalog.expected_general = self.general
        for name in _OF_THE_BASE:
            self.__dict__.pop(name, None)

    def _layers_of(self, domain: str) -> dict[str, Tensor]:
        """The domain layers that a domain has now, its own or inherited."""
        info = self.domains[domain]
        if domain == ROOT_DOMAIN:
            raise UnsupportedModelError(
                f"domain {domain!r} is the root, whose layers are the base model's: distil without a domain"
            )
        found = layer_tensors(self.catalog, info.layer_identity).tensors
        return {
            name: torch.tensor(values) for name, values in found.items() if name.startswith("encoder.layer.")
        }

    @contextmanager
    def _teacher_folder(self, teacher: str | Path | None) -> Iterator[Path]:
        """Folder of the model to learn from, in transformers' format."""
        distilled = read_distillation(self.general_folder)
        if teacher is None and distilled is None:
            yield self.general_folder
            return
        source = str(self.general.source if teacher is None else teacher)
        with tempfile.TemporaryDirectory(prefix="hmi-teacher-") as temporary:
            found = Path(temporary)
            sizes, _ = import_bert(source, found)
            if sizes != load_bert_configuration(self.general_folder):
                raise UnsupportedModelError(
                    f"{source}: the teacher has not the sizes of the store's base model"
                )
            if distilled is not None and weights_sha256(_weights(found)) != distilled[0].teacher_sha256:
                raise UnsupportedModelError(
                    f"{source} is not the model that the store's base was distilled from; name that one as "
                    "the teacher (--teacher)"
                )
            yield found


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_bert_tensors(folder, load_bert_configuration(folder))


def _texts(
    corpus: Corpus, text_field: str, stdin_format: Literal["txt", "jsonl"], report: CorpusReport
) -> Iterator[str]:
    yield from stream_texts(corpus, text_field=text_field, stdin_format=stdin_format, report=report)
    check_not_empty(report)


def _check_compact_file(compact: Path, *folders: str | Path | None) -> None:
    """Raises :class:`StoreError` where a file cannot be written, or is or has to be a folder."""
    if compact.is_dir():
        raise StoreExistsError(f"{compact} is a folder; name a file for the compact form")
    for folder in folders:
        if folder is not None and Path(folder).absolute().is_relative_to(compact.absolute()):
            raise StoreExistsError(f"{compact} has to be a folder, for {folder}; name another compact file")
    check_writable(compact)
