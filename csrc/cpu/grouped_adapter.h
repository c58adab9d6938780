// Many tenants' adapters in one batch: segments of tokens, each with an adapter of its own and its own rank.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/simd/simd_kernels.h"

namespace hmi {

struct GroupedAdapterArguments {
  float* outputs;
  int64_t output_stride;
  const float* inputs;
  int64_t input_stride;
  int64_t num_tokens;
  int64_t input_size;
  int64_t output_size;
  const float* arena;
  int64_t arena_size;
  const int64_t* segment_offsets;  // [num_segments + 1]
  const int32_t* segment_slots;    // [num_segments], -1 for no adapter
  int64_t num_segments;
  const int64_t* slot_offsets;  // [num_slots], in elements of the arena
  const int32_t* slot_ranks;    // [num_slots], 0 for nothing here
  // [num_slots]; null for LoRA, whose blocks are a[input_size, rank], b[rank, output_size] and nothing else, while a
  // bottleneck's are down[input_size, rank], down_bias[rank], up[rank, output_size], up_bias[output_size].
  const int32_t* slot_activations;
  const float* slot_scales;
  int64_t num_slots;
};

// outputs[t] += scale * (activation(inputs[t] @ down + down_bias) @ up + up_bias), with the slot of t's segment, for each
// of `projections`, whose outputs must not meet. Throws std::invalid_argument, before anything is changed, if a segment,
// slot, rank, activation or block is out of bounds.
void grouped_adapter(const std::vector<GroupedAdapterArguments>& projections, int num_threads);

}  // namespace hmi
