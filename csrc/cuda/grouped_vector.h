// Many tenants' vectors in one batch: IA3 scaling (Liu et al., arXiv 2205.05638) and BitFit biases (Ben Zaken et al.,
// arXiv 2106.10199).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/data_type.h"

namespace hmi::cuda {

enum class VectorOperation : int32_t { kScale, kAdd };

struct GroupedVectorArguments {
  VectorOperation operation;
  DataType data_type;  // kFloat16 or kBfloat16: hidden_states and arena
  void* hidden_states;  // [num_tokens, hidden_size], rows stride elements apart; changed in place
  int64_t stride;
  int64_t num_tokens;
  int32_t hidden_size;
  const void* arena;
  int64_t arena_size;
  const int64_t* segment_offsets;  // [num_segments + 1]
  const int32_t* segment_slots;    // [num_segments], -1 for none
  int64_t num_segments;
  const int64_t* slot_offsets;  // [num_slots], multiples of 8; -1 for nothing here
  int64_t num_slots;
  unsigned long long* fault;
};

// kScale: hidden_states[t] *= vector of t's slot. kAdd: hidden_states[t] += it. In float32, rounded once.
cudaError_t grouped_vector(const GroupedVectorArguments& arguments, cudaStream_t stream);

}  // namespace hmi::cuda
