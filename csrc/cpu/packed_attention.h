// Attention of each sequence of a packed batch to itself; nothing is padded.
#pragma once

#include <cstdint>

namespace hmi {

// Sequence s owns the rows query_offsets[s] .. query_offsets[s + 1] of queries and outputs, and likewise of keys and
// values. Rows hold num_heads * head_size dense floats and may lie apart (a column slice of a wider matrix). Strides are
// in elements.
struct PackedAttentionArguments {
  const float* queries;
  int64_t query_stride;
  const float* keys;
  int64_t key_stride;
  const float* values;
  int64_t value_stride;
  float* outputs;
  int64_t output_stride;
  const int64_t* query_offsets;  // [num_sequences + 1]
  const int64_t* key_offsets;    // [num_sequences + 1]
  int64_t num_sequences;
  int64_t num_queries;
  int64_t num_keys;
  int64_t num_heads;
  int64_t head_size;
};

// outputs[q] = softmax(queries[q] keys.T / sqrt(head_size)) values, per sequence and head. Throws
// std::invalid_argument, before anything is written, if the offsets do not describe the rows, or a sequence has queries
// but no keys.
void packed_attention(const PackedAttentionArguments& arguments, int num_threads);

}  // namespace hmi
