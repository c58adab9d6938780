"""Makes the folder of a new store: the base model, the catalog, and the root's unigram rows."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from hmi_engine.construct.counting import Progress
from hmi_engine.construct.distilled_model import check_purpose, import_distillation
from hmi_engine.construct.materialise import build_root_table
from hmi_engine.errors import HmiError, StoreError, StoreExistsError, StoreFullError, UnsupportedModelError
from hmi_engine.knowledge.atomic import PARTIAL_SUFFIX, fsync_path, make_folders, storage_error
from hmi_engine.knowledge.catalog import ROOT_DOMAIN, Catalog
from hmi_engine.knowledge.changes import save_domain
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.layout import StoreLayout
from hmi_engine.knowledge.tensor_file import file_sha256
from hmi_engine.models.bert_loading import BertConfiguration, import_bert
from hmi_engine.models.families import load_model, read_model_type
from hmi_engine.models.gpt2_loading import Gpt2Configuration, import_gpt2

__all__ = ["create_store"]


def create_store(
    path: Path,
    *,
    source: str,
    distilled: Path | None,
    plot_layers: int | None,
    window: Literal[2, 3] | None,
    row_dtype: Literal["float16", "float32"],
    progress: Progress | None,
) -> None:
    """Makes a store at ``path``, all of it or nothing: it is built beside and renamed when it is whole.

    When it has its name it is on the disk. Of several that make the same store at once, one does. Args and
    errors are those of :meth:`hmi_engine.store.Store.create`; ``source`` is its ``general``.
    """
    if path.exists():
        raise _exists(path)
    _check_encodable(path)
    partial = StoreLayout(path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}"))
    try:
        changed_folders = make_folders(path.parent)
        partial.root.mkdir()
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        info = _import_general(source, distilled, partial, plot_layers, window, row_dtype)
        with Catalog.create(partial, info) as catalog:
            if info.plot_layers:
                model = load_model(partial.general, info.plot_layers, is_causal=info.is_causal)
                root = build_root_table(model.window_states, info, progress=progress)
                save_domain(catalog, ROOT_DOMAIN, root)
        for written in (*partial.root.rglob("*"), partial.root):
            fsync_path(written)
        _put_in_place(partial.root, path)
    except BaseException as error:
        shutil.rmtree(partial.root, ignore_errors=True)
        if _is_full_disk(error):
            raise StoreFullError(f"{path}: no room for the store; free some space and try again") from error
        if isinstance(error, OSError) and not isinstance(error, HmiError):
            raise storage_error(error, path) from error
        raise
    _flush(changed_folders, path)


def _check_encodable(path: Path) -> None:
    """The tokenizer's library opens no file whose path is no UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise StoreError(
            f"{str(path)!a}: the name is no UTF-8; choose another folder for the store"
        ) from error


def _put_in_place(partial: Path, path: Path) -> None:
    try:
        partial.rename(path)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _exists(path) from error
        raise


def _flush(folders: list[Path], path: Path) -> None:
    try:
        for folder in folders:
            fsync_path(folder)
    except OSError as error:
        raise storage_error(error, path) from error


def _exists(path: Path) -> StoreExistsError:
    return StoreExistsError(f"{path} exists; choose a new folder for the store, or open it")


def _is_full_disk(error: BaseException) -> bool:
    """Whether a library's write failed for want of room; safetensors wraps the system's error in its own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    full = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), os.strerror(errno.EFBIG))
    return isinstance(error, SafetensorError) and any(reason in str(error) for reason in full)


def _import_general(
    source: str,
    distilled: Path | None,
    layout: StoreLayout,
    plot_layers: int | None,
    window: Literal[2, 3] | None,
    row_dtype: Literal["float16", "float32"],
) -> GeneralInfo:
    if read_model_type(source) == "gpt2":
        if distilled is not None:
            raise UnsupportedModelError(f"{source}: a decoder cannot be made of {distilled} yet")
        sizes = _sizes(import_gpt2(source, layout.general))
        sizes |= {"family": "gpt2", "placeholder_token_id": None}
    else:
        configuration, placeholder = import_bert(source, layout.general)
        sizes = _sizes(configuration) | {"family": "bert", "placeholder_token_id": placeholder}
        report = import_distillation(source, distilled, layout.general)
        if report is not None:
            check_purpose(report, plot_layers, window)
            plot_layers, window = report.plot_layers, report.window
    chosen = sizes["num_layers"] // 2 if plot_layers is None else plot_layers
    info = GeneralInfo(
        source=source,
        plot_layers=chosen,
        window=window or (3 if sizes["family"] == "gpt2" else 2),
        row_dtype=row_dtype,
        tokenizer_sha256=file_sha256(layout.general / "tokenizer.json"),
        domain_layers=f"{file_sha256(layout.general / 'model.safetensors')[:16]}:{chosen}",
        **sizes,
    )
    info.check_supported()
    return info


def _sizes(configuration: BertConfiguration | Gpt2Configuration) -> dict[str, Any]:
    """What the catalog keeps of a model's configuration."""
    names = ("num_layers", "hidden_size", "num_heads", "intermediate_size", "vocab_size", "max_positions")
    return {name: getattr(configuration, name) for name in names}
