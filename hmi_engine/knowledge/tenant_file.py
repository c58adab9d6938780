"""A tenant's file: adapter blocks and head as one run of float32, read by one call into the caller's memory.

Order: the blocks by layer and site name, each block in the order in which kernels read it (``down, down_bias,
up, up_bias``; ``a, b``; ``vector``), then the head's tensors by name. So all of one layer is contiguous, the
block's offset in the data section is all that an arena needs to know, and with sizes that are multiples of 16
every matrix of a block begins on a cache line. What is no tensor (the settings of each block's kind, the
head's labels) is JSON in the header's metadata.
"""

import math
import os
from pathlib import Path

import torch
from torch import Tensor

from hmi_engine.errors import InvalidAdapterError, InvalidHeadError, StoreCorruptError
from hmi_engine.knowledge.adapter_kinds import KIND_OF_SITE
from hmi_engine.knowledge.adapters import Adapter, Block
from hmi_engine.knowledge.general import GeneralInfo
from hmi_engine.knowledge.head_layout import HEAD_PREFIX, TensorPlace
from hmi_engine.knowledge.heads import Head
from hmi_engine.knowledge.tenant_layout import (
    MAX_HEADER_BYTES,
    BlockLayout,
    HeadLayout,
    TenantLayout,
    describe_tenant,
    parse_layout,
    read_layout,
)
from hmi_engine.knowledge.tensor_file import HeaderTooLargeError, write_tensors

__all__ = [
    "BlockLayout",
    "HeadLayout",
    "TenantLayout",
    "load_tenant",
    "parse_layout",
    "read_into",
    "read_layout",
    "write_tenant",
]


def write_tenant(path: Path, adapter: Adapter, head: Head, *, sync: bool = True) -> str:
    """Write a validated adapter and head as float32, atomically; return the file's SHA-256 in hex.

    Adapter and head must have passed ``validate``. ``sync`` is that of
    :func:`~hmi_engine.knowledge.atomic.atomic_write`, whose errors are raised. Raises
    :class:`InvalidHeadError`, and writes nothing, where the labels take more room than readers give them.
    """
    tensors: dict[str, Tensor] = {}
    for (layer, site), block in adapter.ordered_blocks():
        place = f"layer.{layer:03d}.{site.value}."
        for name, tensor in block.tensors().items():
            tensors[place + name] = tensor.to("cpu", torch.float32)
    for name, tensor in sorted(head.tensors().items()):
        tensors[HEAD_PREFIX + name] = tensor.to("cpu", torch.float32)
    metadata = describe_tenant(adapter, head)
    try:
        return write_tensors(path, tensors, metadata, max_header_bytes=MAX_HEADER_BYTES, sync=sync)
    except HeaderTooLargeError as error:
        raise InvalidHeadError(
            f"{head.kind} head: its {len(head.labels)} labels do not fit into a tenant's file ({error}); "
            "give it fewer or shorter labels"
        ) from error


def read_into(path: Path, layout: TenantLayout, buffer: Tensor | memoryview) -> None:
    """Fill ``buffer`` with the file's data section by one positioned read, without a copy between.

    ``buffer`` is a contiguous 1-D float32 CPU tensor of ``layout.num_elements``, or a writable memoryview of
    ``layout.data_bytes``. Raises ValueError if it is not, and :class:`StoreCorruptError` if the file has
    become shorter or is gone.
    """
    view = _writable_view(buffer)
    if view.nbytes != layout.data_bytes:
        raise ValueError(f"buffer has {view.nbytes} bytes, the tenant's data {layout.data_bytes}")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            num_read = os.preadv(descriptor, [view], layout.data_start)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise StoreCorruptError(f"{path}: cannot be read: {error.strerror}") from error
    if num_read != layout.data_bytes:
        raise StoreCorruptError(
            f"{path}: holds {num_read} of {layout.data_bytes} bytes of data; it is cut short"
        )


def _writable_view(buffer: Tensor | memoryview) -> memoryview:
    if isinstance(buffer, memoryview):
        return buffer
    if buffer.dtype != torch.float32 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise ValueError(
            f"buffer must be contiguous 1-D float32, not {buffer.dtype} of shape {list(buffer.shape)}"
        )
    return buffer.detach().numpy().data


def load_tenant(
    path: Path, general: GeneralInfo | None = None, *, layout: TenantLayout | None = None
) -> tuple[Adapter, Head]:
    """Return a file's adapter and head as tensors of their own, checked against ``general`` if given.

    ``layout`` is the file's, where it has been read already. Raises as :func:`read_layout` does, and
    :class:`StoreCorruptError` where it does not fit ``general``.
    """
    layout = read_layout(path) if layout is None else layout
    data = torch.empty(layout.num_elements, dtype=torch.float32)
    read_into(path, layout, data)
    adapter = Adapter({(block.layer, block.site): _block(block, data) for block in layout.blocks})
    head = layout.head.build(data)
    if general is not None:
        try:
            adapter.validate(general)
            head.validate(general)
        except (InvalidAdapterError, InvalidHeadError) as error:
            raise StoreCorruptError(f"{path}: {error}") from error
    return adapter, head


def _block(block: BlockLayout, data: Tensor) -> Block:
    kind = KIND_OF_SITE[block.site]
    tensors: dict[str, Tensor] = {}
    offset = block.offset_elements
    for name, shape in kind.shapes(block.sizes).items():
        tensors[name] = TensorPlace(offset, shape).view(data)
        offset += math.prod(shape)
    return kind.block(tensors, block.settings)
