# ruff: noqa: N999
# Addresses are integers; sizes and strides count elements. The caller checks dtypes, shapes and strides.
from collections.abc import Sequence
from typing import Any

compiler: str
with_cuda: bool
cuda: Any  # there if with_cuda: what hmi_kernels.cuda calls
cuda_architectures: str

def set_simd_level(level: str) -> None: ...
def simd_level() -> str: ...
def compiled_simd_levels() -> list[str]: ...
def available_simd_levels() -> list[str]: ...
def set_threads_mode(mode: str) -> None: ...
def threads_mode() -> str: ...
def release_team() -> None: ...
def keep_freed_memory() -> bool: ...
def plot_index_capacity(count: int) -> int: ...
def plot_index_build(index: int, capacity: int, keys: int, count: int) -> None: ...
def plot_index_insert(index: int, capacity: int, keys: int, rows: int, count: int) -> None: ...
def plot_index_find(
    index: int, capacity: int, keys: int, rows: int, count: int, num_threads: int
) -> None: ...
def plot_lookup(
    input_ids: int,
    num_tokens: int,
    sequence_offsets: int,
    num_sequences: int,
    indexes: list[tuple[int, int]],
    chains: int,
    chain_width: int,
    window: int,
    references: int,
    num_threads: int,
) -> None: ...
def plot_merge(
    input_ids: int,
    num_tokens: int,
    sequence_offsets: int,
    num_sequences: int,
    references: int,
    row_tables: list[tuple[int, int, int, int, int, int]],
    unigram_tables: list[tuple[int, int, int, int, int, int]],
    sequence_unigram_tables: int,
    position_embeddings: int,
    num_positions: int,
    layer_norm_weight: int,
    layer_norm_bias: int,
    layer_norm_eps: float,
    window: int,
    hidden_size: int,
    output: int,
    num_threads: int,
) -> None: ...
def grouped_adapter(
    output: int,
    output_stride: int,
    output_sizes: Sequence[int],
    hidden_states: int,
    hidden_stride: int,
    hidden_size: int,
    num_tokens: int,
    arena: int,
    arena_size: int,
    segment_offsets: int,
    segment_slots: int,
    num_segments: int,
    slot_offsets: int,
    slot_ranks: int,
    slot_activations: int,
    slot_scales: int,
    num_slots: int,
    num_threads: int,
) -> None: ...
def packed_attention(
    query: int,
    query_stride: int,
    key: int,
    key_stride: int,
    value: int,
    value_stride: int,
    output: int,
    output_stride: int,
    query_offsets: int,
    key_offsets: int,
    num_sequences: int,
    num_queries: int,
    num_keys: int,
    num_heads: int,
    head_size: int,
    num_threads: int,
) -> None: ...
def causal_lookup(
    windows: int,
    num_tokens: int,
    indexes: list[tuple[int, int]],
    chains: int,
    num_chains: int,
    chain_width: int,
    token_chains: int,
    references: int,
    num_threads: int,
) -> None: ...
def causal_merge(
    input_ids: int,
    positions: int,
    references: int,
    num_tokens: int,
    row_tables: list[tuple[int, int, int, int, int, int]],
    unigram_tables: list[tuple[int, int, int, int, int, int]],
    token_unigram_tables: int,
    position_embeddings: int,
    num_positions: int,
    layer_norm_weight: int,
    layer_norm_bias: int,
    layer_norm_eps: float,
    hidden_size: int,
    output: int,
    num_threads: int,
) -> None: ...
def paged_attention(
    query: int,
    query_stride: int,
    key: int,
    key_stride: int,
    value: int,
    value_stride: int,
    output: int,
    output_stride: int,
    key_cache: int,
    value_cache: int,
    num_blocks: int,
    block_size: int,
    block_tables: int,
    table_width: int,
    query_offsets: int,
    context_lengths: int,
    num_sequences: int,
    num_queries: int,
    num_heads: int,
    head_size: int,
    num_threads: int,
) -> None: ...

class NgramCounter:
    def __init__(self, order: int) -> None: ...
    def add(
        self, input_ids: int, num_tokens: int, sequence_offsets: int, num_sequences: int, num_threads: int
    ) -> None: ...
    def items(self, min_count: int, num_threads: int) -> bytearray: ...
    def take_shard(self, shard: int) -> bytearray: ...
    @property
    def num_shards(self) -> int: ...
    def __len__(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def memory_bytes(self) -> int: ...

def sketch_max_memory_bytes(max_items: int) -> int: ...

class FrequencySketch:
    def __init__(self, max_items: int) -> None: ...
    def add(self, keys: int, count: int, weight: float) -> None: ...
    def add_windows(
        self,
        input_ids: int,
        num_tokens: int,
        sequence_offsets: int,
        num_sequences: int,
        sequence_numbers: int,
        num_numbers: int,
        window: int,
        weight: float,
    ) -> None: ...
    def merge(self, other: FrequencySketch) -> None: ...
    def scale(self, factor: float) -> None: ...
    def clear(self) -> None: ...
    def items(self, min_weight: float) -> bytearray: ...
    def __len__(self) -> int: ...
    @property
    def total(self) -> float: ...
    @property
    def max_error(self) -> float: ...
    @property
    def memory_bytes(self) -> int: ...

def check_segments(
    segment_offsets: int,
    segment_slots: int,
    num_segments: int,
    num_tokens: int,
    num_slots: int,
    slot_offsets: int,
    slot_ranks: int,
    slot_activations: int,
    arena_size: int,
    per_rank: int,
    fixed: int,
    multiple: int,
    max_rank: int,
) -> None: ...
def check_matrices(
    segment_offsets: int,
    segment_slots: int,
    num_segments: int,
    num_tokens: int,
    num_slots: int,
    slot_offsets: int,
    slot_rows: int,
    slot_columns: int,
    arena_size: int,
    max_rows: int,
    max_columns: int,
    multiple: int,
    must_be_disjoint: bool,
) -> None: ...
def grouped_product(
    outputs: int,
    output_size: int,
    inputs: int,
    input_stride: int,
    input_size: int,
    num_tokens: int,
    arena: int,
    arena_size: int,
    segment_offsets: int,
    segment_slots: int,
    num_segments: int,
    slot_offsets: int,
    slot_rows: int,
    slot_columns: int,
    num_slots: int,
    is_transposed: bool,
    num_threads: int,
) -> None: ...
def grouped_weight_gradient(
    gradient: int,
    arena_size: int,
    inputs: int,
    input_stride: int,
    input_size: int,
    output_gradients: int,
    output_stride: int,
    output_size: int,
    num_tokens: int,
    segment_offsets: int,
    segment_slots: int,
    num_segments: int,
    slot_offsets: int,
    slot_rows: int,
    slot_columns: int,
    num_slots: int,
    num_threads: int,
) -> None: ...
def read_files(
    paths: list[bytes],
    offsets: list[int],
    sizes: list[int],
    destinations: list[int],
    check_finite: bool,
    num_threads: int,
) -> list[tuple[int, int, bool]]: ...

class FileReads:
    def __init__(
        self,
        paths: list[bytes],
        offsets: list[int],
        sizes: list[int],
        destinations: list[int],
        check_finite: bool,
        num_threads: int,
        owner: object,
    ) -> None: ...
    def start(self) -> None: ...
    def wait(self, seconds: float) -> bool: ...
    def cancel(self) -> None: ...
    def progress(self) -> list[tuple[int, int, int, bool, float]]: ...
    @property
    def seconds(self) -> float: ...

def release_ended_reads() -> None: ...
def set_read_latency(seconds_per_read: float, bytes_per_second: float) -> None: ...

class Block: ...

class BlockPool:
    def allocate(self, bytes: int) -> Block: ...
    def enlist(self, address: int, bytes: int, is_read_only: bool) -> None: ...
    def close(self) -> None: ...
    @property
    def is_closed(self) -> bool: ...
    @property
    def is_pinned(self) -> bool: ...
    @property
    def bytes_in_use(self) -> int: ...
    @property
    def bytes_reserved(self) -> int: ...
    @property
    def budget_bytes(self) -> int: ...

def block_size(bytes: int) -> int: ...
def plain_pool(budget_bytes: int) -> BlockPool: ...
def copy_pieces(destinations: list[int], sources: list[int], sizes: list[int]) -> None: ...
def grouped_vector(
    is_scale: bool,
    rows: int,
    stride: int,
    num_tokens: int,
    hidden_size: int,
    arena: int,
    arena_size: int,
    segment_offsets: int,
    segment_slots: int,
    num_segments: int,
    slot_offsets: int,
    num_slots: int,
    num_threads: int,
) -> None: ...
