"""The header of a tenant's file: what lies where, checked before a byte of it is used."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hmi_engine.errors import StoreCorruptError, StoreVersionError
from hmi_engine.knowledge.adapters import LORA_SITES, Adapter, BottleneckBlock, Site, site_sizes
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.heads import Head, HeadKind, Pooling
from hmi_engine.knowledge.tensor_file import TensorEntry, read_header

__all__ = ["FORMAT_VERSION", "BlockLayout", "HeadLayout", "TenantLayout", "describe_tenant", "read_layout"]

FORMAT_VERSION = 1
_MAX_HEADER_BYTES = 1 << 20
_FLOAT_BYTES = 4


class _StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _BlockRecord(_StrictModel):
    layer: int
    site: str
    activation: str | None = None
    scale: float


class _HeadRecord(_StrictModel):
    kind: HeadKind
    labels: list[str] = []
    pooling: Pooling | None = None
    multi_label: bool = False
    normalize: bool = False


class _Record(_StrictModel):
    blocks: list[_BlockRecord]
    head: _HeadRecord


@dataclass(frozen=True)
class BlockLayout:
    """Where one block lies: ``num_elements`` float32 from ``offset_elements`` of the data section.

    ``inputs`` and ``outputs`` are the sizes of the block's input and output. ``activation`` is None for LoRA.
    """

    layer: int
    site: Site
    rank: int
    activation: str | None
    scale: float
    inputs: int
    outputs: int
    offset_elements: int
    num_elements: int

    @property
    def kind(self) -> str:
        """``"lora"`` or ``"bottleneck"``."""
        return "lora" if self.activation is None else "bottleneck"


@dataclass(frozen=True)
class HeadLayout:
    """The head's settings and where its tensors lie in the data section (None where it has none).

    ``weight_offset`` and ``bias_offset`` count float32 elements; weight is [C, ``hidden_size``] for C labels.
    """

    kind: HeadKind
    labels: tuple[str, ...]
    pooling: Pooling | None
    multi_label: bool
    normalize: bool
    hidden_size: int | None
    weight_offset: int | None
    bias_offset: int | None


@dataclass(frozen=True)
class TenantLayout:
    """A tenant file's checked header: ``data_bytes`` of float32 begin at byte ``data_start``."""

    data_start: int
    data_bytes: int
    blocks: tuple[BlockLayout, ...]
    head: HeadLayout

    @property
    def num_elements(self) -> int:
        """Length of the float32 buffer that :func:`read_into` fills."""
        return self.data_bytes // _FLOAT_BYTES

    @property
    def layer_spans(self) -> dict[int, tuple[int, int]]:
        """First and last-plus-one element of all of a layer's blocks, by layer."""
        spans: dict[int, tuple[int, int]] = {}
        for block in self.blocks:
            start = spans.get(block.layer, (block.offset_elements, 0))[0]
            spans[block.layer] = (start, block.offset_elements + block.num_elements)
        return spans

    def check_fits(self, general: GeneralInfo, path: Path) -> None:
        """Raise :class:`StoreCorruptError`, naming ``path``, where sizes or layers are not the base's."""
        for block in self.blocks:
            fits = (block.inputs, block.outputs) == site_sizes(block.site, general)
            if not fits or block.layer not in general.upper_layers:
                raise StoreCorruptError(
                    f"{path}: block at layer {block.layer}, {block.site} does not fit the base"
                )
        if self.head.hidden_size not in (None, general.hidden_size):
            raise StoreCorruptError(
                f"{path}: head of size {self.head.hidden_size} does not fit the base model"
            )


def describe_tenant(adapter: Adapter, head: Head) -> dict[str, str]:
    """Return the header's metadata for a tenant: all that is no tensor."""
    record = _Record(
        blocks=[
            _BlockRecord(
                layer=layer,
                site=site.value,
                activation=block.activation if isinstance(block, BottleneckBlock) else None,
                scale=float(block.scale),
            )
            for (layer, site), block in adapter.ordered_blocks()
        ],
        head=_HeadRecord(
            kind=head.kind,
            labels=list(head.labels),
            pooling=getattr(head, "pooling", None),
            multi_label=getattr(head, "multi_label", False),
            normalize=getattr(head, "normalize", False),
        ),
    )
    return {"format": "hmi-tenant", "format_version": str(FORMAT_VERSION), "hmi": record.model_dump_json()}


def read_layout(path: Path) -> TenantLayout:
    """Read where everything in a tenant's file lies; only the header is read.

    Raises :class:`StoreCorruptError`, naming the file, where the header contradicts itself or the file, and
    :class:`StoreVersionError` for a file of a newer format.
    """
    header = read_header(path, max_header_bytes=_MAX_HEADER_BYTES)
    record = _checked_record(path, header.metadata)
    entries = list(header.entries)
    if any(entry.dtype != "F32" for entry in entries):
        raise StoreCorruptError(f"{path}: a tenant's tensors are all F32")
    blocks = tuple(_block_layout(path, block, entries) for block in record.blocks)
    head = _head_layout(path, record.head, entries)
    if entries:
        raise StoreCorruptError(f"{path}: tensor {entries[0].name!r:.80} is not described by the metadata")
    places = [(block.layer, block.site.value) for block in blocks]
    if places != sorted(set(places)):
        raise StoreCorruptError(f"{path}: blocks are not in the order of layers and sites")
    return TenantLayout(header.data_start, header.data_bytes, blocks, head)


def _checked_record(path: Path, metadata: Mapping[str, str]) -> _Record:
    version = metadata.get("format_version", "")
    if metadata.get("format") != "hmi-tenant" or not version.isdecimal():
        raise StoreCorruptError(f"{path}: no tenant file of HMI")
    if int(version) > FORMAT_VERSION:
        raise StoreVersionError(
            f"{path}: format version {int(version)}, this HMI reads up to {FORMAT_VERSION}; upgrade HMI"
        )
    try:
        return _Record.model_validate_json(metadata.get("hmi", ""))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise StoreCorruptError(f"{path}: metadata {where}: {problem['msg']}") from error


def _take(path: Path, entries: list[TensorEntry], names: list[str]) -> list[TensorEntry]:
    """Remove the next entries of these names, in this order, from the front of ``entries``."""
    taken = entries[: len(names)]
    found = [entry.name for entry in taken]
    if found != names:
        raise StoreCorruptError(f"{path}: expected tensors {names} next, found {found}")
    del entries[: len(names)]
    return taken


def _check_shapes(path: Path, entries: list[TensorEntry], shapes: list[tuple[int, ...]]) -> None:
    for entry, shape in zip(entries, shapes, strict=True):
        if entry.shape != shape:
            raise StoreCorruptError(f"{path}: {entry.name} has shape {entry.shape}, expected {shape}")


def _head_layout(path: Path, record: _HeadRecord, entries: list[TensorEntry]) -> HeadLayout:
    labels = tuple(record.labels)
    if (record.pooling is None) != (record.kind == "token_classification"):
        raise StoreCorruptError(f"{path}: pooling of a {record.kind} head is {record.pooling}")
    hidden_size = weight_offset = bias_offset = None
    if record.kind != "embedding":
        bias, weight = _take(path, entries, ["output_head.bias", "output_head.weight"])
        hidden_size = weight.shape[-1] if weight.shape else 0
        _check_shapes(path, [bias, weight], [(len(labels),), (len(labels), hidden_size)])
        weight_offset, bias_offset = weight.start // _FLOAT_BYTES, bias.start // _FLOAT_BYTES
    return HeadLayout(
        kind=record.kind,
        labels=labels,
        pooling=record.pooling,
        multi_label=record.multi_label,
        normalize=record.normalize,
        hidden_size=hidden_size,
        weight_offset=weight_offset,
        bias_offset=bias_offset,
    )


def _block_layout(path: Path, record: _BlockRecord, entries: list[TensorEntry]) -> BlockLayout:
    where = f"layer.{record.layer:03d}.{record.site}"
    try:
        site = Site(record.site)
    except ValueError as error:
        raise StoreCorruptError(f"{path}: {where}: unknown site") from error
    is_lora = site in LORA_SITES
    if is_lora != (record.activation is None):
        raise StoreCorruptError(f"{path}: {where}: activation is {record.activation!r:.80}")
    names = ("a", "b") if is_lora else ("down", "down_bias", "up", "up_bias")
    taken = _take(path, entries, [f"{where}.{name}" for name in names])
    first, up = taken[0], taken[1 if is_lora else 2]
    if len(first.shape) != 2 or len(up.shape) != 2:
        raise StoreCorruptError(f"{path}: {where}: shapes {first.shape} and {up.shape} are no matrices")
    (inputs, rank), outputs = first.shape, up.shape[1]
    shapes = [(inputs, rank), (rank,), (rank, outputs), (outputs,)]
    _check_shapes(path, taken, [shapes[0], shapes[2]] if is_lora else list(shapes))
    return BlockLayout(
        layer=record.layer,
        site=site,
        rank=rank,
        activation=record.activation,
        scale=record.scale,
        inputs=inputs,
        outputs=outputs,
        offset_elements=first.start // _FLOAT_BYTES,
        num_elements=(taken[-1].end - first.start) // _FLOAT_BYTES,
    )
