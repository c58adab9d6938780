// Causal attention of new tokens to all tokens of their sequences, whose keys and values lie in blocks of a cache.
#pragma once

#include <cstdint>

namespace hmi {

// Sequence s brings the rows query_offsets[s] .. query_offsets[s + 1] of queries, keys and values: its last tokens.
// With them it has context_lengths[s] tokens; token i lies in block block_tables[s, i / block_size] of the cache, at
// place i % block_size. No block that a new token is written to may belong to another sequence of the call. Strides are
// in elements.
struct PagedAttentionArguments {
  const float* queries;
  int64_t query_stride;
  const float* keys;
  int64_t key_stride;
  const float* values;
  int64_t value_stride;
  float* outputs;
  int64_t output_stride;
  float* key_cache;    // [num_blocks, num_heads, head_size, block_size]: as the products read them
  float* value_cache;  // [num_blocks, num_heads, block_size, head_size]
  int64_t num_blocks;
  int64_t block_size;
  const int32_t* block_tables;  // [num_sequences, table_width]; behind a sequence's last block anything
  int64_t table_width;
  const int64_t* query_offsets;    // [num_sequences + 1]
  const int64_t* context_lengths;  // [num_sequences]
  int64_t num_sequences;
  int64_t num_queries;
  int64_t num_heads;
  int64_t head_size;
};

// Writes the new keys and values into the cache, then outputs[q] = softmax(queries[q] keys.T / sqrt(head_size)) values
// over the tokens of the sequence up to q's own. A query's result depends neither on other queries nor on how many
// tokens came with it, bit for bit. Throws std::invalid_argument, before anything is written, where offsets, lengths and
// blocks do not fit.
void paged_attention(const PagedAttentionArguments& arguments, int num_threads);

}  // namespace hmi
