"""What a build of a domain's table keeps on disk, so that it goes on after a kill where it was.

    builds/<digest of the name>/lock              held while a process builds the domain; says its name
                                plan.safetensors       what was counted and chosen
                                codebooks.safetensors  of product quantized rows
                                *.rows, batches.log    the rows computed so far

The plan is the commit point: without it, the rest means nothing and is removed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from pydantic import ValidationError
from torch import Tensor

from hmi_engine.construct.row_files import RowWriter
from hmi_engine.construct.table_plan import TablePlan
from hmi_engine.errors import StoreCorruptError
from hmi_engine.knowledge.atomic import remove_quietly
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.locks import FolderLock
from hmi_engine.knowledge.mapped_file import map_tensors
from hmi_engine.knowledge.plot_table import PlotMetadata
from hmi_engine.knowledge.tensor_file import TensorHeader, read_header, write_tensors

__all__ = ["BuildFolder", "RowWriter"]

_PLAN_TENSORS = ("keys", "counts", "candidate_keys", "candidate_counts", "documents")
_MAX_HEADER_BYTES = 1 << 24


class BuildFolder:
    """The folder of one build, locked; leave it as a context manager.

    Leaving it without :meth:`remove` keeps what the next build of the same domain can go on from.
    """

    def __init__(self, folder: Path, lock: FolderLock) -> None:
        """Use :meth:`open`."""
        self.path = folder
        self._lock = lock

    @classmethod
    def open(cls, layout: StoreLayout, domain_name: str) -> BuildFolder:
        """Lock the folder of builds of ``domain_name``, making it if it is missing.

        Raises :class:`StoreBusyError` while another thread or process builds that domain, and
        :class:`StoreFullError` or :class:`ReadOnlyStoreError` where the folder cannot be made.
        """
        # Names are compared and kept as text, but never become paths.
        folder = layout.builds / hashlib.sha256(domain_name.encode()).hexdigest()[:16]
        lock = FolderLock(
            folder,
            busy=f"{layout.root}: another process is building domain {domain_name!r}; wait until it is done, "
            "or stop it (what it has done is kept)",
        )
        opened = cls(folder, lock)
        try:
            lock.describe(domain_name)
        except BaseException:
            opened.close()
            raise
        return opened

    def __enter__(self) -> BuildFolder:
        """Return the folder itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the folder."""
        self.close()

    def close(self) -> None:
        """Give the lock back; a folder from which no build can go on is removed first."""
        if not self._plan_file.exists():
            self.remove()
        self._lock.release()

    def remove(self) -> None:
        """Remove the folder and give the lock back: the build is done. Mapped tensors stay good."""
        self._lock.remove_folder()

    def load(self, fingerprint: str) -> TablePlan | None:
        """Return the plan of an interrupted build that was saved under the same ``fingerprint``.

        If there is none, or it cannot be read, everything in the folder is removed.
        """
        plan = self._read_plan(fingerprint) if self._plan_file.exists() else None
        if plan is None:
            self._clear()
        return plan

    def save(self, plan: TablePlan, fingerprint: str) -> None:
        """Keep ``plan`` atomically in place of everything that is in the folder.

        Raises as :func:`~hmi_engine.knowledge.atomic.atomic_write`.
        """
        self._clear()
        metadata = {
            "format": "hmi-build",
            "fingerprint": fingerprint,
            "metadata": plan.metadata.model_dump_json(),
            "statistics": json.dumps(plan.statistics),
        }
        write_tensors(self._plan_file, {name: getattr(plan, name) for name in _PLAN_TENSORS}, metadata)

    @property
    def codebooks(self) -> Tensor | None:
        """The codebooks that were trained for this build, None as long as there are none.

        Setting them keeps them atomically; raises as :func:`~hmi_engine.knowledge.atomic.atomic_write`.
        """
        if not self._codebooks_file.exists():
            return None
        try:
            return _read_tensors(self._codebooks_file)[1].get("codebooks")
        except StoreCorruptError:
            remove_quietly(self._codebooks_file)
            return None

    @codebooks.setter
    def codebooks(self, codebooks: Tensor) -> None:
        write_tensors(self._codebooks_file, {"codebooks": codebooks}, {"format": "hmi-build"})

    def rows(self, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> RowWriter:
        """Return a writer of the build's rows that goes on after those which are there.

        ``shapes`` gives dtype and shape [N, ...] by name, as
        :func:`~hmi_engine.knowledge.row_formats.stored_shapes` does, without the codebooks.
        """
        return RowWriter(self.path, shapes)

    @property
    def _plan_file(self) -> Path:
        return self.path / "plan.safetensors"

    @property
    def _codebooks_file(self) -> Path:
        return self.path / "codebooks.safetensors"

    def _read_plan(self, fingerprint: str) -> TablePlan | None:
        try:
            header, tensors = _read_tensors(self._plan_file)
            if header.metadata.get("fingerprint") != fingerprint:
                return None
            return TablePlan(
                **{name: tensors[name] for name in _PLAN_TENSORS},
                metadata=PlotMetadata.model_validate_json(header.metadata["metadata"]),
                statistics=json.loads(header.metadata["statistics"]),
            )
        except (StoreCorruptError, KeyError, ValidationError, json.JSONDecodeError):
            return None

    def _clear(self) -> None:
        # The plan goes first: a crash on the way must not leave a plan with another plan's rows.
        remove_quietly(self._plan_file)
        self._lock.clear_folder()


def _read_tensors(path: Path) -> tuple[TensorHeader, dict[str, Tensor]]:
    header = read_header(path, max_header_bytes=_MAX_HEADER_BYTES)
    return header, map_tensors(path, header)
