// Adapters on tensor cores: one block for one tile of up to 64 tokens of a segment, from the inputs to the finished
// outputs, with nothing in between in global memory.
//
//   inputs [rows, 64] --.                          outputs [rows, 64] --.
//   down [64, ranks] ---+--> sums: registers       up [ranks, 64] ------+--> + scale * (sums + bias) --> outputs
//   (stages of a ring)       bias, activation      (same ring)          |    in place in the stage, or, if a layer
//                            inner [rows, ranks]: 16 bits, shared ------'    norm follows, in rows kept until its end
//
// Everything arrives by cp.async, weights, inputs and outputs once a tile, a stage ahead or more. Shared tiles are
// swizzled (swizzled_tile.cuh). The ranks are the segment's own: the template bounds registers and shared memory only.
// LoRA is the case of 1 to 4 projections without biases, activation and layer norm; their inner columns lie side by
// side, so that the inputs are read once for all.
#pragma once

#include "cuda/adapter_layer_norm.cuh"
#include "cuda/grouped_adapter_pipeline.cuh"

namespace hmi::cuda {

// A warp's place among those of its block; the three parts of the second hold the same warps, divided otherwise.
template <class TileType>
struct WarpPlace {
  int row;     // first of its 16 rows
  int rank;    // 0 .. warps across ranks
  int depth;   // 0 .. warps across depth
  int column;  // 0 .. warps of the same rows

  __device__ __forceinline__ WarpPlace() {
    const int warp = threadIdx.x / kWarpSize;
    row = warp % TileType::kWarpsAcrossRows * kTensorTile;
    column = warp / TileType::kWarpsAcrossRows;
    rank = column % TileType::kWarpsAcrossRanks;
    depth = column / TileType::kWarpsAcrossRanks;
  }
};

// Of the inner columns, in groups of 16, a warp has every kWarpsAcrossRanks-th: even if the ranks are few, all work.
template <class TileType>
struct InnerSums {
  static constexpr int kGroups = TileType::shape().rank_class / kTensorTile / TileType::kWarpsAcrossRanks > 0
                                     ? TileType::shape().rank_class / kTensorTile / TileType::kWarpsAcrossRanks
                                     : 1;
  float sums[kGroups][2][4] = {};
};

// One chunk's share of inputs @ down.
template <class Element, class TileType>
__device__ __forceinline__ void multiply_down(const Block<Element, TileType>& block, const WarpPlace<TileType>& warp,
                                              int stage, int depth, InnerSums<TileType>& inner) {
  constexpr int kGroups = InnerSums<TileType>::kGroups;
  const SwizzledTile inputs = block.columns(stage), weights = block.down_weights(stage);
  const int groups = block.work.inner_columns / kTensorTile;
  const auto is_used = [&](int g) { return g * TileType::kWarpsAcrossRanks + warp.rank < groups; };
  const int left = round_up(block.arguments.input_size - depth, kTensorTile);
  const int steps = min(TileType::kChunk, left) / kTensorTile;
#pragma unroll
  for (int s = 0; s < TileType::kChunk / kTensorTile; s += TileType::kWarpsAcrossDepth) {
    const int step = s + warp.depth;
    if (step >= steps) break;
    // All loads of a step before its products: what they wait for, they wait for together.
    unsigned rows[4], columns[kGroups][4];
    load_left(rows, inputs, warp.row, step);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (is_used(g)) load_right(columns[g], weights, step, g * TileType::kWarpsAcrossRanks + warp.rank);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (is_used(g)) multiply_add<Element>(inner.sums[g], rows, columns[g]);
    }
  }
}

// Adds what the warps across the depth have summed, in their order, in the first of them.
template <class Element, class TileType>
__device__ __forceinline__ void add_partial_sums(const Block<Element, TileType>& block,
                                                 const WarpPlace<TileType>& warp, InnerSums<TileType>& inner) {
  constexpr int kGroups = InnerSums<TileType>::kGroups;
  constexpr int kWarpsOfDepth = TileType::kWarpsAcrossRows * TileType::kWarpsAcrossRanks;
  unsigned char* partial_sums = block.shared + block.memory.partial_sums;
  const int groups = block.work.inner_columns / kTensorTile;
  const int number = warp.row / kTensorTile * TileType::kWarpsAcrossRanks + warp.rank;
  const auto place = [&](int depth, int group, int half) {
    const int fragment = (((depth - 1) * kWarpsOfDepth + number) * kGroups + group) * 2 + half;
    return partial_sums + (fragment * kWarpSize + threadIdx.x % kWarpSize) * sizeof(Vector16<float>);
  };
  const auto is_used = [&](int g) { return g * TileType::kWarpsAcrossRanks + warp.rank < groups; };
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float(&sums)[4] = inner.sums[g][half];
      if (warp.depth > 0 && is_used(g)) {
        store_unit(place(warp.depth, g, half), pack(Vector16<float>{{sums[0], sums[1], sums[2], sums[3]}}));
      }
    }
  }
  __syncthreads();
  if (warp.depth > 0) return;
#pragma unroll
  for (int i = 0; i < kGroups * 2; ++i) {
    const int g = i / 2, half = i % 2;
    if (!is_used(g)) break;
    float(&sums)[4] = inner.sums[g][half];
#pragma unroll
    for (int depth = 1; depth < TileType::kWarpsAcrossDepth; ++depth) {
      const Vector16<float> more = unpack<float>(load_unit(place(depth, g, half)));
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] += more.elements[k];
    }
  }
}

// Bias, activation, rounding: the inner state. Columns that only pad become zero, so that an infinity in the inputs
// cannot make a NaN of them.
template <class Element, class TileType>
__device__ __forceinline__ void finish_inner(const Block<Element, TileType>& block, const WarpPlace<TileType>& warp,
                                             InnerSums<TileType>& inner) {
  constexpr int kHalves = InnerSums<TileType>::kGroups * 2;
  const int lane = threadIdx.x % kWarpSize;
  const SwizzledTile to = block.inner();
  const bool has_bias = block.work.down_bias != nullptr;
  const int activation = block.work.activation, groups = block.work.inner_columns / kTensorTile;
  // Not unrolled, as activations are long: the sums of eight columns after the other move to where the code is.
#pragma unroll 1
  for (int i = 0; i < kHalves; ++i) {
    const int group = i / 2 * TileType::kWarpsAcrossRanks + warp.rank, half = i % 2;
    if (group >= groups) break;
    const int column = group * kTensorTile + half * 8 + lane % 4 * 2;
    const bool is_real = half == 0 || (block.work.half_groups >> group & 1) == 0;
    float2 bias = {0.0f, 0.0f};
    if (has_bias && is_real) {
      bias = load_pair<Element>(block.shared + block.memory.down_bias + column * sizeof(Element));
    }
    const float(&sums)[4] = inner.sums[0][0];
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      const float first = activate(activation, sums[2 * lower] + bias.x);
      const float second = activate(activation, sums[2 * lower + 1] + bias.y);
      unsigned char* pair = to.unit(warp.row + lower * 8 + lane / 4, column / kUnitElements) +
                            column % kUnitElements * sizeof(Element);
      store_pair<Element>(pair, is_real ? first : 0.0f, is_real ? second : 0.0f);
    }
#pragma unroll
    for (int next = 1; next < kHalves; ++next) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        inner.sums[(next - 1) / 2][(next - 1) % 2][k] = inner.sums[next / 2][next % 2][k];
      }
    }
  }
}

// Of a chunk's columns, in groups of 16, a warp has as many neighbouring ones as there are.
template <class TileType>
struct OutputSums {
  static constexpr int kChunkGroups = TileType::kChunk / kTensorTile;
  static constexpr int kWarpsOfRow = TileType::shape().warps_per_row();
  static constexpr int kGroups = kChunkGroups > kWarpsOfRow ? kChunkGroups / kWarpsOfRow : 1;
  float sums[kGroups][2][4] = {};
};

// inner @ up of one chunk.
template <class Element, class TileType>
__device__ __forceinline__ void multiply_up(const Block<Element, TileType>& block, const WarpPlace<TileType>& warp,
                                            int stage, const TileProjection<Element>& projection,
                                            OutputSums<TileType>& output) {
  constexpr int kGroups = OutputSums<TileType>::kGroups;
  const SwizzledTile inner = block.inner(), weights = block.up_weights(stage);
  const int first = projection.inner_begin / kTensorTile;
  const int steps = round_up(projection.rank, kTensorTile) / kTensorTile;
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
    unsigned rows[4], columns[kGroups][4];
    load_left(rows, inner, warp.row, first + step);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) load_right(columns[g], weights, step, warp.column * kGroups + g);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) multiply_add<Element>(output.sums[g], rows, columns[g]);
  }
}

// outputs += scale * (sums + bias), in place in shared memory, rounded once.
template <class Element, class TileType>
__device__ __forceinline__ void add_to_outputs(const WarpPlace<TileType>& warp, const SwizzledTile& outputs,
                                               const unsigned char* up_bias, float scale,
                                               const OutputSums<TileType>& output) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int i = 0; i < OutputSums<TileType>::kGroups * 2; ++i) {
    const int unit = warp.column * OutputSums<TileType>::kGroups * 2 + i, offset = lane % 4 * 2 * sizeof(Element);
    float2 bias = {0.0f, 0.0f};
    if (up_bias != nullptr) bias = load_pair<Element>(up_bias + unit * 16 + offset);
    const float(&sums)[4] = output.sums[i / 2][i % 2];
#pragma unroll
    for (int lower = 0; lower < 2; ++lower) {
      unsigned char* pair = outputs.unit(warp.row + lower * 8 + lane / 4, unit) + offset;
      const float2 before = load_pair<Element>(pair);
      store_pair<Element>(pair, before.x + scale * (sums[2 * lower] + bias.x),
                          before.y + scale * (sums[2 * lower + 1] + bias.y));
    }
  }
}

// A warp writes its 16 rows of its columns. Eight lanes, which access shared memory together, take whole rows of them;
// where these do not fill a line, rows that lie in different banks.
template <class Element, class TileType>
__device__ __forceinline__ void store_outputs(const Block<Element, TileType>& block, const WarpPlace<TileType>& warp,
                                              const SwizzledTile& from, Element* to, int columns_left) {
  constexpr int kUnits = OutputSums<TileType>::kGroups * 2;
  constexpr bool kFillsRow = kUnits == 1 << TileType::kLogChunkUnits;
#pragma unroll
  for (int i = threadIdx.x % kWarpSize; i < kTensorTile * kUnits; i += kWarpSize) {
    const int eight = i / 8, within = i % 8 / kUnits, rows = 8 / kUnits;
    const int spread_row = eight / kUnits * 8 + within * kUnits + eight % kUnits;
    const int row = warp.row + (kFillsRow ? eight * rows + within : spread_row);
    const int unit = warp.column * kUnits + i % kUnits;
    if (row >= block.work.rows || unit * kUnitElements >= columns_left) continue;
    store16(to + row * block.arguments.output_stride + unit * kUnitElements, load_unit(from.unit(row, unit)));
  }
}

template <class Element, class TileType>
__device__ __forceinline__ void apply_adapter(const Block<Element, TileType>& block) {
  const GroupedAdapterArguments& arguments = block.arguments;
  const WarpPlace<TileType> warp;
  ChunkLoader<Element, TileType> loader(block);
  for (int i = 0; i < block.num_stages - 1; ++i) loader.load_next();
  int stage = 0;
  const auto next_stage = [&] { stage = stage + 1 == block.num_stages ? 0 : stage + 1; };

  InnerSums<TileType> inner;
  for (int depth = 0; depth < arguments.input_size; depth += TileType::kChunk, next_stage()) {
    wait_for_chunk(block.num_stages);
    loader.load_next();
    multiply_down(block, warp, stage, depth, inner);
  }
  if constexpr (TileType::kWarpsAcrossDepth > 1) add_partial_sums(block, warp, inner);
  if (warp.depth == 0) finish_inner(block, warp, inner);

  OutputCursor cursor{};
  cursor.find(block.work, arguments.num_projections);
  for (; cursor.projection < arguments.num_projections; next_stage()) {
    wait_for_chunk(block.num_stages);
    loader.load_next();
    const TileProjection<Element>& projection = block.work.projections[cursor.projection];
    if (warp.column * OutputSums<TileType>::kGroups < OutputSums<TileType>::kChunkGroups) {
      OutputSums<TileType> output;
      multiply_up(block, warp, stage, projection, output);
      const SwizzledTile outputs = block.has_layer_norm() ? block.finished(cursor.column) : block.columns(stage);
      const unsigned char* up_bias = projection.up_bias == nullptr ? nullptr : block.up_bias(stage);
      add_to_outputs<Element>(warp, outputs, up_bias, projection.scale, output);
      if (!block.has_layer_norm()) {
        __syncwarp();
        store_outputs(block, warp, outputs, block.outputs + projection.output_begin + cursor.column,
                      projection.output_size - cursor.column);
      }
    }
    cursor.advance(block.work, arguments.num_projections, TileType::kChunk);
  }
}

template <class Element, class TileType>
__global__ void __launch_bounds__(TileType::kThreads, TileType::shape().min_blocks())
    adapter_tiles_kernel(const GroupedAdapterArguments arguments, int num_stages) {
  HMI_DYNAMIC_SHARED(shared);
  HMI_SHARED(TileWork<Element>, work);
  if (threadIdx.x < kWarpSize) {
    const SegmentTile tile = find_tile(arguments, TileType::kRows);
    if (threadIdx.x == 0) describe_work(arguments, tile, work);
  }
  __syncthreads();
  if (work.rows == 0) return;
  const int layer_norm_size = arguments.layer_norm_weight != nullptr ? arguments.output_sizes[0] : 0;
  const Block<Element, TileType> block{
      arguments,
      work,
      shared,
      tile_memory(TileType::shape(), num_stages, layer_norm_size),
      num_stages,
      static_cast<const Element*>(arguments.inputs) + work.row * arguments.input_stride,
      static_cast<Element*>(arguments.outputs) + work.row * arguments.output_stride};
  if (work.inner_columns > 0) {
    apply_adapter(block);
  } else {
    copy_rows(block);
  }
  if (block.has_layer_norm()) normalize_rows(block);
}

}  // namespace hmi::cuda
