// The layer norm at the end of the tile kernel, over rows that lie finished in shared memory.
#pragma once

#include "cuda/grouped_adapter_pipeline.cuh"

namespace hmi::cuda {

// For a segment without an adapter: its rows are normalized as they are.
template <class Element, class TileType>
__device__ __forceinline__ void copy_rows(const Block<Element, TileType>& block) {
  const int size = block.arguments.output_sizes[0];
  for (int column = 0; column < size; column += TileType::kChunk) {
    copy_columns<Element, TileType, false>(block.finished(column), block.outputs, block.arguments.output_stride,
                                           block.work.rows, column, size);
  }
  cp_async_commit();
  cp_async_wait<0>();
}

// Calls visit(value) for what this lane has of a row.
template <class Element, class TileType, class Visit>
__device__ __forceinline__ void for_lane_values(const Block<Element, TileType>& block, int row, Visit visit) {
  constexpr int kUnits = 1 << TileType::kLogChunkUnits;
  for (int unit = threadIdx.x % kWarpSize; unit < block.arguments.output_sizes[0] / kUnitElements; unit += kWarpSize) {
    const SwizzledTile columns = block.finished(unit / kUnits * TileType::kChunk);
    const Vector16<Element> values = unpack<Element>(load_unit(columns.unit(row, unit % kUnits)));
#pragma unroll
    for (int i = 0; i < kUnitElements; ++i) visit(to_float(values.elements[i]));
  }
}

// Mean and reciprocal deviation of every row, a warp for each; in two passes, as the second sum is of small numbers.
template <class Element, class TileType>
__device__ __forceinline__ void measure_rows(const Block<Element, TileType>& block, float2* statistics) {
  const float size = static_cast<float>(block.arguments.output_sizes[0]);
  for (int row = threadIdx.x / kWarpSize; row < block.work.rows; row += TileType::kWarps) {
    float sum = 0.0f, squares = 0.0f;
    for_lane_values(block, row, [&](float value) { sum += value; });
    const float mean = warp_sum(sum) / size;
    for_lane_values(block, row, [&](float value) { squares += (value - mean) * (value - mean); });
    const float deviation = rsqrtf(warp_sum(squares) / size + block.arguments.layer_norm_epsilon);
    if (threadIdx.x % kWarpSize == 0) statistics[row] = {mean, deviation};
  }
}

// A thread normalizes eight columns of all rows: weight and bias are read once.
template <class Element, class TileType>
__device__ __forceinline__ void normalize_columns(const Block<Element, TileType>& block, const float2* statistics,
                                                  int column) {
  const Vector16<Element> weight =
      unpack<Element>(load16(static_cast<const Element*>(block.arguments.layer_norm_weight) + column));
  const Vector16<Element> bias =
      unpack<Element>(load16(static_cast<const Element*>(block.arguments.layer_norm_bias) + column));
  const SwizzledTile columns = block.finished(column);
  for (int row = 0; row < block.work.rows; ++row) {
    Vector16<Element> values =
        unpack<Element>(load_unit(columns.unit(row, column % TileType::kChunk / kUnitElements)));
    const float2 statistic = statistics[row];
#pragma unroll
    for (int i = 0; i < kUnitElements; ++i) {
      const float normal = (to_float(values.elements[i]) - statistic.x) * statistic.y;
      values.elements[i] = from_float<Element>(normal * to_float(weight.elements[i]) + to_float(bias.elements[i]));
    }
    store16(block.outputs + row * block.arguments.output_stride + column, pack(values));
  }
}

// A warp has whole rows of up to 1,024 columns in registers, one after the other: shared memory is read once.
constexpr int kMaxUnitsOfLane = 4;

template <class Element, class TileType>
__device__ __forceinline__ void normalize_narrow_rows(const Block<Element, TileType>& block) {
  constexpr int kUnits = 1 << TileType::kLogChunkUnits;
  const int size = block.arguments.output_sizes[0], units = size / kUnitElements;
  const int lane = threadIdx.x % kWarpSize;
  uint4 weight[kMaxUnitsOfLane], bias[kMaxUnitsOfLane];
#pragma unroll
  for (int u = 0; u < kMaxUnitsOfLane; ++u) {
    const int unit = lane + u * kWarpSize;
    if (unit >= units) break;
    weight[u] = load16(static_cast<const Element*>(block.arguments.layer_norm_weight) + unit * kUnitElements);
    bias[u] = load16(static_cast<const Element*>(block.arguments.layer_norm_bias) + unit * kUnitElements);
  }
  for (int row = threadIdx.x / kWarpSize; row < block.work.rows; row += TileType::kWarps) {
    float values[kMaxUnitsOfLane][kUnitElements], sum = 0.0f, squares = 0.0f;
#pragma unroll
    for (int u = 0; u < kMaxUnitsOfLane; ++u) {
      const int unit = lane + u * kWarpSize;
      if (unit >= units) break;
      const SwizzledTile columns = block.finished(unit / kUnits * TileType::kChunk);
      const Vector16<Element> own = unpack<Element>(load_unit(columns.unit(row, unit % kUnits)));
#pragma unroll
      for (int i = 0; i < kUnitElements; ++i) sum += values[u][i] = to_float(own.elements[i]);
    }
    const float mean = warp_sum(sum) / static_cast<float>(size);
#pragma unroll
    for (int u = 0; u < kMaxUnitsOfLane; ++u) {
      if (lane + u * kWarpSize >= units) break;
#pragma unroll
      for (int i = 0; i < kUnitElements; ++i) {
        values[u][i] -= mean;
        squares += values[u][i] * values[u][i];
      }
    }
    const float deviation =
        rsqrtf(warp_sum(squares) / static_cast<float>(size) + block.arguments.layer_norm_epsilon);
#pragma unroll
    for (int u = 0; u < kMaxUnitsOfLane; ++u) {
      const int unit = lane + u * kWarpSize;
      if (unit >= units) break;
      const Vector16<Element> scale = unpack<Element>(weight[u]), shift = unpack<Element>(bias[u]);
      Vector16<Element> normal;
#pragma unroll
      for (int i = 0; i < kUnitElements; ++i) {
        normal.elements[i] = from_float<Element>(values[u][i] * deviation * to_float(scale.elements[i]) +
                                                 to_float(shift.elements[i]));
      }
      store16(block.outputs + row * block.arguments.output_stride + unit * kUnitElements, pack(normal));
    }
  }
}

template <class Element, class TileType>
__device__ __forceinline__ void normalize_rows(const Block<Element, TileType>& block) {
  if (block.arguments.output_sizes[0] <= kMaxUnitsOfLane * kWarpSize * kUnitElements) {
    __syncthreads();
    normalize_narrow_rows(block);
    return;
  }
  float2* statistics = reinterpret_cast<float2*>(block.shared + block.memory.statistics);
  __syncthreads();
  measure_rows(block, statistics);
  __syncthreads();
  const int size = block.arguments.output_sizes[0];
  for (int column = threadIdx.x * kUnitElements; column < size; column += TileType::kThreads * kUnitElements) {
    normalize_columns(block, statistics, column);
  }
}

}  // namespace hmi::cuda
