// Many tenants' adapters in one batch, on 16-bit floats with sums in float32: see csrc/cpu/grouped_adapter.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/data_type.h"

namespace hmi::cuda {

constexpr int kMaxProjections = 4;

struct GroupedAdapterArguments {
  DataType data_type;  // kFloat16 or kBfloat16: outputs, inputs, arena, layer norm
  void* outputs;       // [num_tokens, sum of output_sizes], rows output_stride elements apart
  int64_t output_stride;
  const void* inputs;  // [num_tokens, input_size], rows input_stride elements apart
  int64_t input_stride;
  int64_t num_tokens;
  int32_t input_size;
  int32_t num_projections;
  int32_t output_sizes[kMaxProjections];
  const void* arena;
  int64_t arena_size;
  const int64_t* segment_offsets;  // [num_segments + 1]
  const int32_t* segment_slots;    // [num_segments], -1 for no adapter
  int64_t num_segments;
  const int64_t* slot_offsets;  // [num_projections, num_slots], multiples of 8
  const int32_t* slot_ranks;    // [num_projections, num_slots], multiples of 8 up to max_rank; 0 for nothing here
  // [num_slots]; null for LoRA. Only a bottleneck (one projection) has activations, biases and a layer norm.
  const int32_t* slot_activations;
  const float* slot_scales;  // [num_projections, num_slots]
  int64_t num_slots;
  int32_t max_rank;
  const void* layer_norm_weight;  // [output_sizes[0]], or null for none
  const void* layer_norm_bias;
  float layer_norm_epsilon;
  float* workspace;  // workspace_elements of the plan
  int32_t max_shared_bytes;  // that a block may have on the device
  unsigned long long* fault;
};

// outputs[t] += scale * (activation(inputs[t] @ down + down_bias) @ up + up_bias), then, if there is a layer norm, over
// every row of every segment (also of those without an adapter) outputs[t] = LayerNorm(outputs[t]).
// Rounded to 16 bits: the inner state, and the sum before its layer norm.
// All rows, blocks and vectors begin at multiples of 16 bytes; sizes are multiples of 8 (see adapter_plan.h).
cudaError_t grouped_adapter(const GroupedAdapterArguments& arguments, cudaStream_t stream);

}  // namespace hmi::cuda
