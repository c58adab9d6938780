// Many tenants' vectors in one batch: IA3 scaling and BitFit biases (see csrc/cuda/grouped_vector.h), in float32.
#pragma once

#include <cstdint>

namespace hmi {

enum class VectorOperation : int32_t { kScale, kAdd };

struct GroupedVectorArguments {
  VectorOperation operation;
  float* hidden_states;  // changed in place
  int64_t stride;
  int64_t num_tokens;
  int64_t hidden_size;
  const float* arena;
  int64_t arena_size;
  const int64_t* segment_offsets;  // [num_segments + 1]
  const int32_t* segment_slots;    // [num_segments], -1 for none
  int64_t num_segments;
  const int64_t* slot_offsets;  // [num_slots], in elements of the arena; -1 for nothing here
  int64_t num_slots;
};

// kScale: hidden_states[t] *= vector of t's slot. kAdd: hidden_states[t] += it. Throws std::invalid_argument, before
// anything is changed, if a segment, slot or vector is out of bounds.
void grouped_vector(const GroupedVectorArguments& arguments, int num_threads);

}  // namespace hmi
