// First product of the GEMV kernels: a group's inputs times the down matrix [depth, rank].
// The matrix lies row after row: thread t takes unit t, t + step, t + 2 step and so on of it, where step is the largest
// multiple of the units in a row that 256 threads allow. So the warps read whole lines, and a thread always has the same
// eight columns. Its sums go to shared memory and are added there, each warp adding one column of every unit.
#pragma once

#include "cuda/gemv_block.cuh"
#include "cuda/weight_stream.cuh"

namespace hmi::cuda {

struct DepthRange {
  int begin;
  int size;  // multiples of 8
};

// Starts copying the group's inputs to shared.rows.
template <class Element, int kTokens>
__device__ __forceinline__ void start_inputs(const GroupedAdapterArguments& arguments, const TokenGroup& group,
                                             const DepthRange& depth, const GemvShared<Element, kTokens>& shared) {
  const Element* inputs = static_cast<const Element*>(arguments.inputs) + depth.begin;
#pragma unroll
  for (int g = 0; g < kTokens; ++g) {
    const bool exists = g < group.tokens;
    const Element* row = inputs + (group.first + (exists ? g : 0)) * arguments.input_stride;
    for (int column = threadIdx.x * kGemvUnit; column < depth.size; column += kGemvThreads * kGemvUnit) {
      cp_async16(shared.rows + g * depth.size + column, row + column, exists);
    }
  }
  cp_async_commit();
}

// The thread's place in the down matrix.
struct ShrinkPlace {
  int units;  // in a row
  int rows;   // that the block takes at a time
  int row;    // of them the thread's; rows or more: it has nothing to do
  int unit;

  __device__ __forceinline__ explicit ShrinkPlace(int rank)
      : units(rank / kGemvUnit),
        rows(kGemvThreads / units),
        row(static_cast<int>(threadIdx.x) / units),
        unit(static_cast<int>(threadIdx.x) % units) {}
};

// Waits for the inputs; leaves every thread's sums in shared.partials, for a barrier to follow.
template <class Element, int kTokens>
__device__ __forceinline__ void multiply_inputs(const AdapterSlot<Element>& slot, const ShrinkPlace& place,
                                                const DepthRange& depth, const GemvShared<Element, kTokens>& shared) {
  const int count = place.row < place.rows && place.row < depth.size
                        ? (depth.size - place.row + place.rows - 1) / place.rows
                        : 0;
  const int64_t first = int64_t{depth.begin + place.row} * slot.rank + place.unit * kGemvUnit;
  WeightStream<Element> weights(slot.down + first, place.rows * slot.rank, count);
  float sums[kTokens][kGemvUnit] = {};
  cp_async_wait<0>();
  __syncthreads();
  const Element* const inputs = shared.rows + place.row;
  const int size = depth.size, rows = place.rows;
  multiply(weights, [=](int g, int i) { return to_float(inputs[g * size + i * rows]); }, sums);
#pragma unroll
  for (int g = 0; g < kTokens; ++g) {
#pragma unroll
    for (int j = 0; j < kGemvUnit; ++j) shared.partial(g, j) = sums[g][j];
  }
}

// Lane u < units gets the sum, over the block's rows, of plane[row * units + u].
__device__ __forceinline__ float sum_rows(const float* plane, const ShrinkPlace& place) {
  const int lane = threadIdx.x % kWarpSize;
  int rows = kWarpSize / place.units;
  const int lanes = rows * place.units;
  float sum = 0.0f;
  for (int i = lane; lane < lanes && i < place.rows * place.units; i += lanes) sum += plane[i];
  while (rows > 1) {
    const int half = (rows + 1) / 2;
    const float other = __shfl_down_sync(kFullWarp, sum, half * place.units);
    if (lane < (rows - half) * place.units) sum += other;
    rows = half;
  }
  return sum;
}

// From shared.partials to shared.inner, through `finish`; a barrier before it and one after.
template <class Element, int kTokens, class Finish>
__device__ __forceinline__ void sum_partials(const ShrinkPlace& place, const GemvShared<Element, kTokens>& shared,
                                             const Finish& finish) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int g = 0; g < kTokens; ++g) {
    const float sum = sum_rows(shared.partials + (g * kGemvUnit + warp) * kGemvThreads, place);
    if (lane < place.units) shared.inner_at(g, lane * kGemvUnit + warp) = finish(sum);
  }
}

}  // namespace hmi::cuda
