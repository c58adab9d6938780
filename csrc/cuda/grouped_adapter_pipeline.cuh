// What a block of the tile kernel works on, and the ring of stages through which all that it reads passes.
//
// Chunk by chunk, in the order of use: first [tile rows, 64] of the inputs with [64, ranks] of every projection's down
// matrix, then for each projection [ranks, 64] of its up matrix with [tile rows, 64] of the outputs and the biases.
// There is no pause between the two products: the first chunks of the second are under way while the first ends.
#pragma once

#include "cuda/adapter_slot.cuh"
#include "cuda/segments.cuh"
#include "cuda/swizzled_tile.cuh"

namespace hmi::cuda {

template <int kRowsOfTile, int kRankClassOfTile, int kChunkOfTile>
struct Tile {
  static constexpr TileShape shape() { return {kRowsOfTile, kRankClassOfTile, kChunkOfTile}; }
  static constexpr int kRows = kRowsOfTile;
  static constexpr int kChunk = kChunkOfTile;
  static constexpr int kWarps = shape().warps();
  static constexpr int kThreads = kWarps * kWarpSize;
  static constexpr int kWarpsAcrossRows = shape().warps_across_rows();
  static constexpr int kWarpsAcrossRanks = shape().warps_across_ranks();
  static constexpr int kWarpsAcrossDepth = shape().warps_across_depth();
  static constexpr int kLogChunkUnits = kChunk == 64 ? 3 : 1;
  static_assert(kUnitElements << kLogChunkUnits == kChunk);
};

template <class Element>
struct TileProjection {
  const Element* down;
  const Element* up;
  const Element* up_bias;
  float scale;
  int rank;          // 0: this projection changes nothing
  int inner_begin;   // its first inner column
  int output_begin;  // its first output column
  int output_size;
};

// One block's work; in shared memory.
template <class Element>
struct TileWork {
  int64_t row;
  int rows;  // 0: nothing to do
  int inner_columns;
  int log_inner_units;        // of a row of all inner columns
  unsigned half_groups;       // bit g: of the 16 inner columns of group g only the first 8 are real
  int activation;
  const Element* down_bias;
  TileProjection<Element> projections[kMaxProjections];
};

__device__ __forceinline__ SegmentTile find_tile(const GroupedAdapterArguments& arguments, int tile_rows) {
  return find_segment_tile(arguments.segment_offsets, arguments.num_segments, arguments.num_tokens, blockIdx.x,
                           tile_rows, arguments.fault, arguments.segment_slots);
}

// Called by one thread.
template <class Element>
__device__ __forceinline__ void describe_work(const GroupedAdapterArguments& arguments, const SegmentTile& tile,
                                              TileWork<Element>& work) {
  work.row = tile.row;
  work.rows = 0;
  if (tile.segment < 0) return;
  const Segment segment{tile.segment, 0, 0, tile.slot};
  int inner_begin = 0, output_begin = 0;
  unsigned half_groups = 0;
  bool is_faulty = false;
#pragma unroll
  for (int p = 0; p < kMaxProjections; ++p) {
    if (p >= arguments.num_projections) break;
    AdapterSlot<Element> slot;
    is_faulty |= load_slot(arguments, segment, p, slot) == SlotState::kFaulty;
    work.projections[p] = {slot.down, slot.up,      slot.up_bias, slot.scale,
                           slot.rank, inner_begin, output_begin, arguments.output_sizes[p]};
    if (p == 0) {
      work.activation = slot.activation;
      work.down_bias = slot.down_bias;
    }
    inner_begin += round_up(slot.rank, kTensorTile);
    output_begin += arguments.output_sizes[p];
    if (slot.rank % kTensorTile != 0) half_groups |= 1u << (inner_begin / kTensorTile - 1);
  }
  work.inner_columns = inner_begin;
  work.half_groups = half_groups;
  work.log_inner_units = 1;
  while (kUnitElements << work.log_inner_units < inner_begin) ++work.log_inner_units;
  const bool has_layer_norm = arguments.layer_norm_weight != nullptr;
  if (has_layer_norm ? !is_faulty : inner_begin > 0) work.rows = tile.rows;
}

// Walks over the chunks of output columns of the projections that change something.
struct OutputCursor {
  int projection;
  int column;

  template <class Element>
  __device__ __forceinline__ void find(const TileWork<Element>& work, int num_projections) {
    while (projection < num_projections && work.projections[projection].rank == 0) ++projection;
  }
  template <class Element>
  __device__ __forceinline__ void advance(const TileWork<Element>& work, int num_projections, int chunk) {
    column += chunk;
    if (column < work.projections[projection].output_size) return;
    column = 0;
    ++projection;
    find(work, num_projections);
  }
};

// Everything that the parts of a block share. Addresses of inputs and outputs are those of the tile's first row.
template <class Element, class TileType>
struct Block {
  const GroupedAdapterArguments& arguments;
  const TileWork<Element>& work;
  unsigned char* shared;
  TileMemory memory;
  int num_stages;
  const Element* inputs;
  Element* outputs;

  __device__ __forceinline__ bool has_layer_norm() const { return arguments.layer_norm_weight != nullptr; }
  __device__ __forceinline__ unsigned char* stage(int number) const {
    return shared + memory.ring + number * memory.stage_bytes;
  }
  __device__ __forceinline__ SwizzledTile down_weights(int number) const {
    return {stage(number), work.log_inner_units};
  }
  __device__ __forceinline__ SwizzledTile up_weights(int number) const {
    return {stage(number), TileType::kLogChunkUnits};
  }
  // Inputs in the first product, outputs in the second, if there is no layer norm.
  __device__ __forceinline__ SwizzledTile columns(int number) const {
    return {stage(number) + memory.weights_bytes, TileType::kLogChunkUnits};
  }
  __device__ __forceinline__ unsigned char* up_bias(int number) const {
    return stage(number) + memory.weights_bytes + memory.columns_bytes;
  }
  // With a layer norm, the rows' columns from `column` on: they stay until the whole row is known. A row of narrow
  // chunks would lie in few banks if these were not turned.
  __device__ __forceinline__ SwizzledTile finished(int column) const {
    constexpr int kUnits = 1 << TileType::kLogChunkUnits;
    const int number = column / TileType::kChunk;
    return {shared + memory.finished_rows + number * memory.columns_bytes, TileType::kLogChunkUnits,
            number % (8 / kUnits) * kUnits};
  }
  __device__ __forceinline__ SwizzledTile inner() const { return {shared + memory.inner, work.log_inner_units}; }
};

// Starts the copies of [tile rows, chunk] from `column` on; `rows` begins at the tile's first row. What lies beyond
// the tile's rows or beyond `size` is left as it is, but for what the last depth step needs to be zero.
template <class Element, class TileType, bool kPadsWithZeros>
__device__ __forceinline__ void copy_columns(const SwizzledTile& to, const Element* rows, int64_t stride, int num_rows,
                                             int column, int size) {
  constexpr int kUnits = 1 << TileType::kLogChunkUnits;
  const int unit = threadIdx.x % kUnits;
  column += unit * kUnitElements;
  if (column >= (kPadsWithZeros ? round_up(size, kTensorTile) : size)) return;
#pragma unroll
  for (int row = threadIdx.x / kUnits; row < TileType::kRows; row += TileType::kThreads / kUnits) {
    if (row < num_rows) cp_async16(to.unit(row, unit), rows + row * stride + column, column < size);
  }
}

// A part of the first group of copies.
template <class Element, class TileType>
__device__ __forceinline__ void copy_down_bias(const Block<Element, TileType>& block) {
  if (block.work.down_bias == nullptr) return;
  const int rank = threadIdx.x * kUnitElements;
  if (rank >= block.work.projections[0].rank) return;
  cp_async16(block.shared + block.memory.down_bias + rank * sizeof(Element), block.work.down_bias + rank);
}

template <class Element, class TileType>
class ChunkLoader {
 public:
  __device__ __forceinline__ explicit ChunkLoader(const Block<Element, TileType>& block) : block_(block) {
    const TileWork<Element>& work = block.work;
    outputs_.find(work, block.arguments.num_projections);
    inner_unit_ = threadIdx.x & ((1 << work.log_inner_units) - 1);
#pragma unroll
    for (int p = 0; p < kMaxProjections; ++p) {
      if (p >= block.arguments.num_projections) break;
      const TileProjection<Element>& projection = work.projections[p];
      const int rank = inner_unit_ * kUnitElements - projection.inner_begin;
      if (rank < 0 || rank >= projection.rank) continue;
      down_ = projection.down + rank;
      down_pitch_ = projection.rank;
    }
    copy_down_bias(block);
  }

  // Starts the copies of the next chunk into the stage that was used longest ago. One group of copies in any case, so
  // that waiting for all groups but the last few is waiting for a chunk.
  __device__ __forceinline__ void load_next() {
    if (depth_ < block_.arguments.input_size) {
      load_down();
      depth_ += TileType::kChunk;
    } else if (outputs_.projection < block_.arguments.num_projections) {
      load_up();
      outputs_.advance(block_.work, block_.arguments.num_projections, TileType::kChunk);
    }
    cp_async_commit();
    stage_ = stage_ + 1 == block_.num_stages ? 0 : stage_ + 1;
  }

 private:
  __device__ __forceinline__ void load_down() {
    const int input_size = block_.arguments.input_size;
    copy_columns<Element, TileType, true>(block_.columns(stage_), block_.inputs, block_.arguments.input_stride,
                                          block_.work.rows, depth_, input_size);
    if (down_ == nullptr) return;
    const SwizzledTile weights = block_.down_weights(stage_);
    const int step = TileType::kThreads >> block_.work.log_inner_units;
    const int left = input_size - depth_, end = min(TileType::kChunk, round_up(left, kTensorTile));
    for (int row = threadIdx.x >> block_.work.log_inner_units; row < end; row += step) {
      cp_async16(weights.unit(row, inner_unit_), down_ + int64_t{depth_ + row} * down_pitch_, row < left);
    }
  }

  __device__ __forceinline__ void load_up() {
    constexpr int kUnits = 1 << TileType::kLogChunkUnits;
    const TileProjection<Element>& projection = block_.work.projections[outputs_.projection];
    const int column = outputs_.column, size = projection.output_size;
    const SwizzledTile columns = block_.has_layer_norm() ? block_.finished(column) : block_.columns(stage_);
    copy_columns<Element, TileType, false>(columns, block_.outputs + projection.output_begin,
                                           block_.arguments.output_stride, block_.work.rows, column, size);
    const int unit = threadIdx.x % kUnits, own_column = column + unit * kUnitElements;
    if (own_column >= size) return;
    const SwizzledTile weights = block_.up_weights(stage_);
    const int rank = projection.rank, end = round_up(rank, kTensorTile);
    for (int row = threadIdx.x / kUnits; row < end; row += TileType::kThreads / kUnits) {
      cp_async16(weights.unit(row, unit), projection.up + int64_t{row} * size + own_column, row < rank);
    }
    if (projection.up_bias != nullptr && threadIdx.x < kUnits) {
      cp_async16(block_.up_bias(stage_) + unit * 16, projection.up_bias + own_column);
    }
  }

  const Block<Element, TileType>& block_;
  int stage_ = 0;
  int depth_ = 0;           // of the next chunk of the first product
  OutputCursor outputs_{};  // the next chunk of the second
  // Of the down matrices this thread copies one unit of every so many rows.
  int inner_unit_;
  const Element* down_ = nullptr;
  int down_pitch_ = 0;
};

// Waits for the oldest of num_stages - 1 chunks under way, for all threads; after it the stage used before is free.
__device__ __forceinline__ void wait_for_chunk(int num_stages) {
  if (num_stages == 2) {
    cp_async_wait<0>();
  } else if (num_stages == 3) {
    cp_async_wait<1>();
  } else {
    cp_async_wait<2>();
  }
  __syncthreads();
}

}  // namespace hmi::cuda
