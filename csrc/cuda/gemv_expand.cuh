// Second product of the GEMV kernels: inner states times the up matrix [rank, output_size], into the outputs.
// A pass takes up to 256 units of columns, one a thread. Narrower passes give several threads the same unit: each takes
// every parts-th row of the matrix, and the thread of part 0 adds their sums in order through shared memory.
#pragma once

#include "cuda/gemv_block.cuh"
#include "cuda/weight_stream.cuh"

namespace hmi::cuda {

// In units.
struct ColumnRange {
  int begin;
  int end;
};

// The thread's place in a pass over columns.
struct ExpandPlace {
  int width;  // units of all passes but the last
  int parts;
  int part;  // parts or more: nothing to do
  int unit;  // within the pass

  __device__ __forceinline__ ExpandPlace(const ColumnRange& columns, int rank) {
    const int units = columns.end - columns.begin;
    const int passes = (units + kGemvThreads - 1) / kGemvThreads;
    width = (units + passes - 1) / passes;
    const int most = kGemvThreads / width;
    parts = most < rank ? most : rank;
    if (parts == 0) parts = 1;  // no adapter, layer norm only
    part = static_cast<int>(threadIdx.x) / width;
    unit = static_cast<int>(threadIdx.x) % width;
  }
};

template <class Element>
__device__ __forceinline__ WeightStream<Element> up_stream(const AdapterSlot<Element>& slot, const ExpandPlace& place,
                                                           int unit, const ColumnRange& columns, int output_size) {
  const bool is_busy = unit < columns.end && place.part < place.parts && place.part < slot.rank;
  const int count = is_busy ? (slot.rank - place.part + place.parts - 1) / place.parts : 0;
  const Element* first = slot.up + int64_t{place.part} * output_size + int64_t{unit} * kGemvUnit;
  return WeightStream<Element>(is_busy ? first : nullptr, place.parts * output_size, count);
}

// Part 0 gets the sums of all parts.
template <class Element, int kTokens>
__device__ __forceinline__ void add_parts(const ExpandPlace& place, const GemvShared<Element, kTokens>& shared,
                                          float (&sums)[kTokens][kGemvUnit]) {
#pragma unroll
  for (int g = 0; g < kTokens; ++g) {
#pragma unroll
    for (int j = 0; j < kGemvUnit; ++j) shared.partial(g, j) = sums[g][j];
  }
  __syncthreads();
  if (place.part != 0) return;
  for (int part = 1; part < place.parts; ++part) {
#pragma unroll
    for (int g = 0; g < kTokens; ++g) {
#pragma unroll
      for (int j = 0; j < kGemvUnit; ++j) sums[g][j] += (&shared.partial(g, j))[part * place.width];
    }
  }
}

// Where a thread's columns of the group's rows come from and go to.
template <class Element, int kTokens>
struct OutputUnits {
  uint4 before[kTokens];
  uint4 bias;

  __device__ __forceinline__ OutputUnits(const Element* outputs, int64_t stride, int tokens, const Element* up_bias)
      : bias{} {
#pragma unroll
    for (int g = 0; g < kTokens; ++g) before[g] = g < tokens ? load16_changing(outputs + g * stride) : uint4{};
    if (up_bias != nullptr) bias = load16(up_bias);
  }

  __device__ __forceinline__ uint4 after(int g, float scale, const float (&sums)[kGemvUnit]) const {
    Vector16<Element> values = unpack<Element>(before[g]);
    const Vector16<Element> biases = unpack<Element>(bias);
#pragma unroll
    for (int j = 0; j < kGemvUnit; ++j) {
      const float added = scale * (sums[j] + to_float(biases.elements[j]));
      values.elements[j] = from_float<Element>(to_float(values.elements[j]) + added);
    }
    return pack(values);
  }
};

template <class Element>
__device__ __forceinline__ Element* output_rows(const GroupedAdapterArguments& arguments, const TokenGroup& group,
                                                int projection) {
  int64_t column = 0;
  for (int p = 0; p < projection; ++p) column += arguments.output_sizes[p];
  return static_cast<Element*>(arguments.outputs) + group.first * arguments.output_stride + column;
}

// shared.inner times the up matrix, added to the group's outputs; with a layer norm the sums are left in shared.rows.
// `weights` is the stream of the first pass.
template <class Element, int kTokens>
__device__ __forceinline__ void expand(const GroupedAdapterArguments& arguments, int projection,
                                       const AdapterSlot<Element>& slot, const TokenGroup& group,
                                       const ColumnRange& columns, const ExpandPlace& place,
                                       WeightStream<Element>& weights, const GemvShared<Element, kTokens>& shared) {
  const int output_size = arguments.output_sizes[projection];
  Element* const outputs = output_rows<Element>(arguments, group, projection);
  const bool has_layer_norm = arguments.layer_norm_weight != nullptr;
  Element* const results = has_layer_norm ? shared.rows : outputs;
  const int64_t result_stride = has_layer_norm ? output_size : arguments.output_stride;
  for (int first = columns.begin; first < columns.end; first += place.width) {
    const int unit = first + place.unit;
    const int column = unit * kGemvUnit;
    const bool is_owner = place.part == 0 && unit < columns.end;
    const OutputUnits<Element, kTokens> units(outputs + column, arguments.output_stride, is_owner ? group.tokens : 0,
                                              is_owner && slot.up_bias != nullptr ? slot.up_bias + column : nullptr);
    float sums[kTokens][kGemvUnit] = {};
    multiply(weights, [&](int g, int i) { return shared.inner_at(g, place.part + i * place.parts); }, sums);
    weights = up_stream(slot, place, unit + place.width, columns, output_size);
    if (place.parts > 1) add_parts(place, shared, sums);  // then this pass is the only one
    if (!is_owner) continue;
#pragma unroll
    for (int g = 0; g < kTokens; ++g) {
      if (g < group.tokens) store16(results + g * result_stride + column, units.after(g, slot.scale, sums[g]));
    }
  }
}

}  // namespace hmi::cuda
