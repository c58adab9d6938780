"""Kernels of HMI: n-gram counts, PLOT look-up and merge, grouped adapters, attention, copies.

They know tensors, and nothing of tenants. Every op is registered with ``torch.library`` as ``hmi::<name>``
and runs on the backend that :func:`use_backend` or ``HMI_BACKEND`` chooses; ``hmi_kernels.reference`` is
the specification of them all. Beside the ops, :class:`PinnedPool` and :func:`copy_batch_async` move memory,
and :func:`start_reads` fills it from files.
"""

from hmi_kernels.adapters import ACTIVATIONS, grouped_bottleneck, grouped_lora
from hmi_kernels.attention import packed_attention
from hmi_kernels.backends import BackendStatus, active_backend, backends, use_backend
from hmi_kernels.causal import causal_lookup, causal_merge
from hmi_kernels.copies import COPY_METHODS, CopyEvent, copy_batch_async, wait_for_copies
from hmi_kernels.cuda.adapters import check_adapter_shape
from hmi_kernels.cuda.driver import raise_faults
from hmi_kernels.deltas import grouped_bottleneck_delta, grouped_lora_delta
from hmi_kernels.errors import CudaError, PoolClosedError, PoolExhaustedError
from hmi_kernels.file_reads import FileReads, PendingRead, prepare_reads, set_read_latency, start_reads
from hmi_kernels.freed_memory import keep_freed_memory
from hmi_kernels.frequency_sketch import FrequencySketch
from hmi_kernels.native import build_info
from hmi_kernels.ngrams import NgramCounter, count_ngrams, ngram_keys, ngram_tokens
from hmi_kernels.paged import paged_attention
from hmi_kernels.pinned_pool import PinnedPool
from hmi_kernels.plot import plot_lookup, plot_merge
from hmi_kernels.plot_index import plot_index_build, plot_index_find, plot_index_insert
from hmi_kernels.products import grouped_product, grouped_weight_gradient
from hmi_kernels.read_files import read_files
from hmi_kernels.reference import MAX_TOKEN_ID, ROW_BITS
from hmi_kernels.row_tables import quantize_rows
from hmi_kernels.thread_teams import release_team
from hmi_kernels.vectors import grouped_bias, grouped_scale

__all__ = [
    "ACTIVATIONS",
    "COPY_METHODS",
    "MAX_TOKEN_ID",
    "ROW_BITS",
    "BackendStatus",
    "CopyEvent",
    "CudaError",
    "FileReads",
    "FrequencySketch",
    "NgramCounter",
    "PendingRead",
    "PinnedPool",
    "PoolClosedError",
    "PoolExhaustedError",
    "active_backend",
    "backends",
    "build_info",
    "causal_lookup",
    "causal_merge",
    "check_adapter_shape",
    "copy_batch_async",
    "count_ngrams",
    "grouped_bias",
    "grouped_bottleneck",
    "grouped_bottleneck_delta",
    "grouped_lora",
    "grouped_lora_delta",
    "grouped_product",
    "grouped_scale",
    "grouped_weight_gradient",
    "keep_freed_memory",
    "ngram_keys",
    "ngram_tokens",
    "packed_attention",
    "paged_attention",
    "plot_index_build",
    "plot_index_find",
    "plot_index_insert",
    "plot_lookup",
    "plot_merge",
    "prepare_reads",
    "quantize_rows",
    "raise_faults",
    "read_files",
    "release_team",
    "set_read_latency",
    "start_reads",
    "use_backend",
    "wait_for_copies",
]
