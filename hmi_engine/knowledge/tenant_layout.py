"""The header of a tenant's file: what lies where, checked before a byte of it is used."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from hmi_engine.errors import InvalidAdapterError, StoreCorruptError, StoreVersionError
from hmi_engine.knowledge.adapter_kinds import KIND_OF_SITE
from hmi_engine.knowledge.adapter_kinds.kind import BlockSizes, Settings
from hmi_engine.knowledge.adapters import Adapter, Site, site_sizes
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.head_layout import HEAD_PREFIX, HeadLayout, HeadRecord, describe_head, place_head
from hmi_engine.knowledge.heads import Head
from hmi_engine.knowledge.tensor_file import TensorEntry, TensorHeader, parse_header, read_header

__all__ = [
    "FORMAT_VERSION",
    "MAX_HEADER_BYTES",
    "BlockLayout",
    "HeadLayout",
    "TenantLayout",
    "describe_tenant",
    "parse_layout",
    "read_layout",
]

FORMAT_VERSION = 2
MAX_HEADER_BYTES = 64 << 20
"""Of a tenant's file, written or read: a million labels of some 60 letters."""

_FLOAT_BYTES = 4


class _StrictModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class _BlockRecord(_StrictModel):
    layer: int
    site: str
    settings: dict[str, str | float] = {}


class _Record(_StrictModel):
    blocks: list[_BlockRecord]
    head: HeadRecord


@dataclass(frozen=True)
class BlockLayout:
    """Where one block lies: ``num_elements`` float32 from ``offset_elements`` of the data section.

    ``inputs`` and ``outputs`` are the sizes of the block's input and output; ``rank`` is 0 for a kind without
    one. ``settings`` are those of the kind.
    """

    layer: int
    site: Site
    rank: int
    settings: Settings
    inputs: int
    outputs: int
    offset_elements: int
    num_elements: int

    @property
    def kind(self) -> str:
        """The name of the block's kind."""
        return KIND_OF_SITE[self.site].name

    @property
    def sizes(self) -> BlockSizes:
        """Input, rank and output."""
        return BlockSizes(self.inputs, self.rank, self.outputs)


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
            _BlockRecord(layer=layer, site=site.value, settings=dict(block.settings()))
            for (layer, site), block in adapter.ordered_blocks()
        ],
        head=describe_head(head),
    )
    return {
        "format": "hmi-tenant",
        "format_version": str(FORMAT_VERSION),
        "hmi": record.model_dump_json(exclude_defaults=True),
    }


def read_layout(path: Path) -> TenantLayout:
    """Read where everything in a tenant's file lies; only the header is read.

    Raises :class:`StoreCorruptError`, naming the file, where the header contradicts itself or the file, and
    :class:`StoreVersionError` for a file of another version of the format.
    """
    return _layout_of(path, read_header(path, max_header_bytes=MAX_HEADER_BYTES))


def parse_layout(path: Path, start: memoryview, file_bytes: int) -> TenantLayout:
    """Return what :func:`read_layout` does, from the first bytes of a file of ``file_bytes``.

    Where the header goes beyond ``start``, the file is read.
    """
    header = parse_header(path, start, file_bytes, max_header_bytes=MAX_HEADER_BYTES)
    return read_layout(path) if header is None else _layout_of(path, header)


def _layout_of(path: Path, header: TensorHeader) -> TenantLayout:
    record = _checked_record(path, header.metadata)
    entries = list(header.entries)
    if any(entry.dtype != "F32" for entry in entries):
        raise StoreCorruptError(f"{path}: a tenant's tensors are all F32")
    blocks = tuple(_block_layout(path, block, entries) for block in record.blocks)
    names = [f"{HEAD_PREFIX}{name}" for name in record.head.tensor_names()]
    head = place_head(path, record.head, _take(path, entries, names))
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
    if int(version) < FORMAT_VERSION:
        raise StoreVersionError(
            f"{path}: format version {int(version)} is from before kinds had settings of their own, this HMI "
            f"reads {FORMAT_VERSION}; add the tenant again"
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


def _block_layout(path: Path, record: _BlockRecord, entries: list[TensorEntry]) -> BlockLayout:
    where = f"layer.{record.layer:03d}.{record.site}"
    try:
        kind = KIND_OF_SITE[Site(record.site)]
    except ValueError as error:
        raise StoreCorruptError(f"{path}: {where}: unknown site") from error
    try:
        kind.check_settings(where, record.settings)
    except InvalidAdapterError as error:
        raise StoreCorruptError(f"{path}: {error}") from error
    names = kind.tensor_names
    taken = _take(path, entries, [f"{where}.{name}" for name in names])
    shapes = {name: entry.shape for name, entry in zip(names, taken, strict=True)}
    sizes = kind.sizes_of(shapes)
    if sizes is None or shapes != dict(kind.shapes(sizes)):
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise StoreCorruptError(f"{path}: {where}: shapes do not fit each other: {found}")
    return BlockLayout(
        layer=record.layer,
        site=Site(record.site),
        rank=sizes.rank,
        settings=record.settings,
        inputs=sizes.inputs,
        outputs=sizes.outputs,
        offset_elements=taken[0].start // _FLOAT_BYTES,
        num_elements=(taken[-1].end - taken[0].start) // _FLOAT_BYTES,
    )
