// The layer norm that may follow a bottleneck: the block's rows lie in shared memory, rounded, and each token has an
// equal share of the warps. Mean first, then the squares of what differs from it, in float32.
#pragma once

#include "cuda/gemv_block.cuh"

namespace hmi::cuda {

// The thread's share of a row.
template <int kTokens>
struct RowShare {
  static constexpr int kWarps = kGemvWarps / kTokens;
  int token;
  int first;  // column
  static constexpr int kStep = kWarps * kWarpSize * kGemvUnit;

  __device__ __forceinline__ RowShare()
      : token(static_cast<int>(threadIdx.x) / (kWarps * kWarpSize)),
        first(static_cast<int>(threadIdx.x) % (kWarps * kWarpSize) * kGemvUnit) {}
};

// Sum of value(x) over a token's row; `sums` holds one number a warp and is not in use.
template <class Element, int kTokens, class Value>
__device__ __forceinline__ float row_sum(const Element* row, int size, const RowShare<kTokens>& share, float* sums,
                                         const Value& value) {
  float sum = 0.0f;
  for (int column = share.first; column < size; column += RowShare<kTokens>::kStep) {
    const Vector16<Element> elements = unpack<Element>(load16_changing(row + column));
#pragma unroll
    for (int j = 0; j < kGemvUnit; ++j) sum += value(to_float(elements.elements[j]));
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  sum = 0.0f;
#pragma unroll
  for (int w = 0; w < RowShare<kTokens>::kWarps; ++w) sum += sums[share.token * RowShare<kTokens>::kWarps + w];
  return sum;
}

// From shared.rows, which every thread has finished writing, to the outputs.
template <class Element, int kTokens>
__device__ __forceinline__ void layer_norm_rows(const GroupedAdapterArguments& arguments, const TokenGroup& group,
                                                const GemvShared<Element, kTokens>& shared) {
  HMI_SHARED(float, sums, [2][kGemvWarps]);
  const RowShare<kTokens> share;
  const int size = share.token < group.tokens ? arguments.output_sizes[0] : 0;
  const Element* const row = shared.rows + share.token * size;
  const float mean = row_sum(row, size, share, sums[0], [](float x) { return x; }) / size;
  const float squares = row_sum(row, size, share, sums[1], [=](float x) { return (x - mean) * (x - mean); });
  const float inverse = rsqrtf(squares / size + arguments.layer_norm_epsilon);

  const auto* weights = static_cast<const Element*>(arguments.layer_norm_weight);
  const auto* biases = static_cast<const Element*>(arguments.layer_norm_bias);
  Element* const output =
      static_cast<Element*>(arguments.outputs) + (group.first + share.token) * arguments.output_stride;
  for (int column = share.first; column < size; column += RowShare<kTokens>::kStep) {
    Vector16<Element> values = unpack<Element>(load16_changing(row + column));
    const Vector16<Element> weight = unpack<Element>(load16(weights + column));
    const Vector16<Element> bias = unpack<Element>(load16(biases + column));
#pragma unroll
    for (int j = 0; j < kGemvUnit; ++j) {
      const float normal = (to_float(values.elements[j]) - mean) * inverse;
      values.elements[j] = from_float<Element>(normal * to_float(weight.elements[j]) + to_float(bias.elements[j]));
    }
    store16(output + column, pack(values));
  }
}

}  // namespace hmi::cuda
