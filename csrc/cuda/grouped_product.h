// Products of segments of rows with a matrix of each segment's slot, and the gradients of those matrices, on 16-bit
// floats with sums in float32: see csrc/cpu/grouped_product.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/data_type.h"

namespace hmi::cuda {

// Rows of 16-bit elements, `stride` elements apart; all rows begin at multiples of 16 bytes.
struct DeviceRows {
  const void* start;
  int64_t stride;
  int32_t columns;  // a multiple of 8
};

struct SlotMatrices {
  const int64_t* segment_offsets;  // [num_segments + 1]
  const int32_t* segment_slots;    // [num_segments], -1 for none
  int64_t num_segments;
  int64_t num_tokens;
  const int64_t* slot_offsets;  // [num_slots], in elements of the arena
  const int32_t* slot_rows;     // [num_slots], 0 for nothing here
  const int32_t* slot_columns;  // likewise
  int64_t num_slots;
  int64_t arena_size;
  unsigned long long* fault;
};

struct GroupedProductArguments {
  DataType data_type;  // kFloat16 or kBfloat16
  void* outputs;       // [num_tokens, output_size], already zero where no slot writes
  int32_t output_size;
  DeviceRows inputs;
  const void* arena;
  SlotMatrices slots;  // offsets, rows and columns are multiples of 8
  bool is_transposed;
};

cudaError_t grouped_product(const GroupedProductArguments& arguments, cudaStream_t stream);

struct GroupedWeightGradientArguments {
  DataType data_type;
  void* gradient;  // [arena_size], already zero where no slot has a matrix
  DeviceRows inputs;
  DeviceRows output_gradients;
  SlotMatrices slots;  // any offsets, rows and columns; matrices in use do not overlap
};

// Without atomics: a block owns one tile of one slot's matrix and adds up the slot's segments in their order.
cudaError_t grouped_weight_gradient(const GroupedWeightGradientArguments& arguments, cudaStream_t stream);

}  // namespace hmi::cuda
