"""Files of a distilled base model: a folder in transformers' format, and the compact form for shipping."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

import hmi_kernels
from hmi_engine.construct.distillation_settings import DistillationReport
from hmi_engine.errors import HmiError, StoreError, StoreExistsError, UnsupportedModelError
from hmi_engine.knowledge.atomic import atomic_write, fsync_path, make_folders, storage_error
from hmi_engine.knowledge.locks import hold_folder
from hmi_engine.knowledge.tensor_file import write_tensors
from hmi_engine.models.bert_loading import load_bert_configuration, load_bert_tensors
from hmi_engine.models.general_folder import MERGE_FILE, WEIGHTS_FILE, load_merge

__all__ = [
    "REPORT_FILE",
    "DistilledModel",
    "apply_compact",
    "check_compact_fits",
    "check_new_folder",
    "check_purpose",
    "check_writable",
    "import_distillation",
    "read_distillation",
    "weights_sha256",
    "write_compact",
    "write_folder",
]

REPORT_FILE = "distillation.json"
_COMPACT_FORMAT = "hmi-distilled"
_MERGE = "merge."
_DELTA, _SCALE = ".delta", ".scale"


@dataclass(frozen=True)
class DistilledModel:
    """What a distillation learned.

    Attributes:
        layers: float32 weights of all encoder layers under transformers' names.
        merge: the tensors of ``merge.safetensors``.
        report: how it went.
    """

    layers: dict[str, Tensor]
    merge: dict[str, Tensor]
    report: DistillationReport


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Digest of a base model's weights, whatever file they lie in; the pooler does not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if not name.startswith("pooler."):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_new_folder(folder: Path) -> None:
    """Raises :class:`StoreExistsError` where a folder holds something, or is a file."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise StoreExistsError(f"{folder} is there already; choose a new folder for the distilled model")


def check_writable(target: Path) -> None:
    """Raises :class:`StoreError` where a file or folder cannot be made, or its folder; nothing is left there.

    A file without a name is made in the first folder above that is there: permissions do not tell all.
    """
    try:
        above = next(folder for folder in target.absolute().parents if folder.exists())
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise StoreError(f"cannot write {target}: {error.strerror}; choose another place") from error


def check_compact_fits(base: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """Raises :class:`UnsupportedModelError` where the compact form would make another model than is learned.

    A student keeps what ``base`` has beside its encoder layers. The compact form is put on ``teacher``, which
    must have the same. Nothing reads the pooler.
    """
    for name, tensor in base.items():
        if not name.startswith(("encoder.layer.", "pooler.")) and not torch.equal(tensor, teacher[name]):
            raise UnsupportedModelError(
                f"the teacher's {name} is not that of the store's base, which the distilled model keeps; the "
                "compact form holds changes of encoder layers only: take --export instead of --compact"
            )


def write_folder(target: Path, base: Path, model: DistilledModel) -> None:
    """Writes a distilled base model as transformers would, with ``merge.safetensors`` and the report.

    When it returns, the folder and its name are on the disk.

    Args:
        target: a folder that does not exist yet, or is empty.
        base: folder of the base model, from which all that distillation does not change is taken.
        model: what was learned.

    Raises:
        StoreFullError: no room; nothing is left behind.
        StoreExistsError: ``target`` holds something.
        StoreBusyError: another model is being written into it.
    """
    check_new_folder(target)
    try:
        changed_folders = set(make_folders(target))
    except OSError as error:
        raise storage_error(error, target) from error
    with hold_folder(target, busy=f"{target}: another model is being written there; choose another folder"):
        check_new_folder(target)  # now that nobody else begins to fill it
        _write_into(target, base, model, changed_folders)


def _write_into(target: Path, base: Path, model: DistilledModel, changed_folders: set[Path]) -> None:
    written = {WEIGHTS_FILE, MERGE_FILE, REPORT_FILE}
    try:
        for path in sorted(base.rglob("*")):
            copy = target / path.relative_to(base)
            if path.is_file() and copy.name not in written:
                changed_folders.update(make_folders(copy.parent))
                shutil.copyfile(path, copy)
                fsync_path(copy)
        tensors = load_bert_tensors(base, load_bert_configuration(base)) | model.layers
        _write_learned(target, tensors, model.merge, model.report)
        for folder in changed_folders:
            fsync_path(folder)
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, OSError) and not isinstance(error, HmiError):
            raise storage_error(error, target) from error
        raise


def _write_learned(
    folder: Path, tensors: dict[str, Tensor], merge: dict[str, Tensor], report: DistillationReport
) -> None:
    write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    write_tensors(folder / MERGE_FILE, merge, {"format": "pt"})
    text = report.model_dump_json(indent=1)
    atomic_write(folder / REPORT_FILE, lambda partial: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


def read_distillation(folder: Path) -> tuple[DistillationReport, dict[str, Tensor]] | None:
    """Reads the report and the merge of a folder that holds a distilled model; None if it holds another one.

    Raises:
        UnsupportedModelError: one of both files is damaged, or the merge is missing.
    """
    report, merge = folder / REPORT_FILE, folder / MERGE_FILE
    if not report.exists():
        return None
    try:
        return DistillationReport.model_validate_json(report.read_text()), load_file(merge)
    except (OSError, ValueError, SafetensorError) as error:  # pydantic's error is a ValueError
        reason = str(error).splitlines()[0]
        raise UnsupportedModelError(
            f"{folder}: a distilled model needs {REPORT_FILE} and {MERGE_FILE}, and one cannot be read: "
            f"{reason}; export it again"
        ) from error


def write_compact(path: Path, teacher: Mapping[str, Tensor], model: DistilledModel) -> None:
    """Writes what a distilled model changes of its teacher, about a byte for each changed weight.

    Matrices are kept as int8 differences with a scale for each row, so what is lost of a weight is at most
    1/254 of the largest change in its row; vectors stay float32, the position table float16.

    Args:
        path: of the file; replaced atomically.
        teacher: the weights that the model was distilled from; see :func:`check_compact_fits`.
        model: what was learned.

    Raises:
        UnsupportedModelError: ``teacher`` is not the model's.
        StoreFullError: no room; an older file stays.
    """
    if weights_sha256(teacher) != model.report.teacher_sha256:
        raise UnsupportedModelError("these weights are not those that the model was distilled from")
    tensors: dict[str, Tensor] = {}
    for name, weight in model.layers.items():
        difference = weight - teacher[name]
        if not difference.any():
            continue
        if difference.dim() == 1:
            tensors[name + _DELTA] = difference
        else:
            quantized, scales = hmi_kernels.quantize_rows(difference[:, None])
            tensors[name + _DELTA], tensors[name + _SCALE] = quantized[:, 0], scales[:, 0].contiguous()
    for name, tensor in model.merge.items():
        tensors[_MERGE + name] = tensor.half() if tensor.dim() == 2 else tensor
    metadata = {"format": _COMPACT_FORMAT, "report": model.report.model_dump_json()}
    write_tensors(path, {name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)


def apply_compact(path: Path, base: Path) -> DistilledModel:
    """Reads what :func:`write_compact` wrote, and puts it on the base model in the folder ``base``.

    Raises:
        UnsupportedModelError: no such file, a damaged one, or one that belongs to another base model.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _COMPACT_FORMAT:
                raise UnsupportedModelError(
                    f"{path} is no compact distilled model; `hmi distill --compact` writes one"
                )
            report = DistillationReport.model_validate_json(metadata["report"])
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModelError(f"{path}: no readable compact distilled model: {reason}") from error
    weights = load_bert_tensors(base, load_bert_configuration(base))
    if weights_sha256(weights) != report.teacher_sha256:
        raise UnsupportedModelError(
            f"{path} belongs to another base model than --general names: their digests differ"
        )
    layers = {
        name: _changed(name, tensor, tensors)
        for name, tensor in weights.items()
        if name.startswith("encoder.layer.")
    }
    merge = {name.removeprefix(_MERGE): t.float() for name, t in tensors.items() if name.startswith(_MERGE)}
    return DistilledModel(layers, _checked_merge(merge, load_merge(base), path), report)


def import_distillation(source: str, compact: Path | None, base: Path) -> DistillationReport | None:
    """Puts what was distilled into the folder ``base`` of a new store; None where there is nothing.

    Args:
        source: where the base model came from: a folder that :func:`write_folder` wrote, or another.
        compact: a file that :func:`write_compact` wrote, for the model in ``source``.
        base: has the model of ``source``, and an undistilled merge.

    Raises:
        UnsupportedModelError: something is damaged, or does not belong to the model.
    """
    found = read_distillation(Path(source))
    if compact is not None:
        if found is not None:
            raise UnsupportedModelError(f"{source} is distilled already, so {compact} does not belong to it")
        model = apply_compact(compact, base)
        weights = load_bert_tensors(base, load_bert_configuration(base)) | model.layers
        _write_learned(base, weights, model.merge, model.report)
        return model.report
    if found is not None:
        report, merge = found
        checked = _checked_merge(merge, load_merge(base), Path(source))
        _write_learned(base, load_bert_tensors(base, load_bert_configuration(base)), checked, report)
        return report
    return None


def check_purpose(report: DistillationReport, plot_layers: int | None, window: int | None) -> None:
    """Raises :class:`UnsupportedModelError` where a store wants another shape than the model was made for.

    None asks for what it was made for.
    """
    wanted = {"plot_layers": (plot_layers, report.plot_layers), "window": (window, report.window)}
    for name, (asked, made) in wanted.items():
        if asked is not None and asked != made:
            raise UnsupportedModelError(
                f"the model was distilled for plot_layers={report.plot_layers} and window={report.window}, "
                f"and serves no {name}={asked}: leave {name} out, or take the model that it came from"
            )


def _changed(name: str, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    difference = tensors.get(name + _DELTA)
    if difference is None:
        return weight
    scale = tensors.get(name + _SCALE)
    return weight + (difference if scale is None else difference.to(torch.float32) * scale[:, None])


def _checked_merge(merge: dict[str, Tensor], like: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The merge, if its tensors are those of the base model's."""
    for name, tensor in like.items():
        if name not in merge or merge[name].shape != tensor.shape or not merge[name].isfinite().all():
            found = list(merge[name].shape) if name in merge else "nothing"
            raise UnsupportedModelError(
                f"{path}: the merge's {name} should be finite and {list(tensor.shape)}, found {found}"
            )
    return {name: merge[name].float() for name in like}
