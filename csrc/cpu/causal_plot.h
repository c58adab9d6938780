// The PLOT of a decoder: a token's row depends on the token and on those before it alone, so that every token stands by
// itself, whatever else its sequence or its batch holds.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/plot_index.h"
#include "cpu/row_table.h"

namespace hmi {

constexpr int kCausalSlots = 3;    // tokens of a window
constexpr int kCausalColumns = 2;  // references of a token: its window, and where that is missing its last two tokens

struct CausalLookupArguments {
  const int32_t* windows;  // [num_tokens, 3]: ids in the order of the text, kAbsent behind the last
  int64_t num_tokens;
  const std::vector<PlotIndex>& indexes;
  const int32_t* chains;  // [num_chains, chain_width]: tables to search in this order, padded with -1
  int64_t num_chains;
  int64_t chain_width;
  const int32_t* token_chains;  // [num_tokens]
  int64_t* references;          // [num_tokens, 2]: table << kRowBits | row, or kMissing
};

// references[t] = {find(a, b, c), where that is missing find(b, c)}, {find(b, c), missing} for a window of two tokens,
// and {missing, missing} for a single one, whose row is its unigram's. Throws std::invalid_argument on a window that no
// text has, and on a chain or a table that does not exist.
void causal_lookup(const CausalLookupArguments& arguments, int num_threads);

struct CausalMergeArguments {
  const int32_t* input_ids;   // [num_tokens]
  const int64_t* positions;   // [num_tokens]: in their sequences
  const int64_t* references;  // [num_tokens, 2], as causal_lookup gives them
  int64_t num_tokens;
  const std::vector<RowTable>& row_tables;      // [num_rows, 1, hidden_size] each
  const std::vector<RowTable>& unigram_tables;  // [vocabulary, 1, hidden_size] each, of floats
  const int32_t* token_unigram_tables;          // [num_tokens]
  const float* position_embeddings;             // [num_positions, hidden_size]
  int64_t num_positions;
  const float* layer_norm_weight;
  const float* layer_norm_bias;
  float layer_norm_epsilon;
  int64_t hidden_size;
  float* output;  // [num_tokens, hidden_size]
};

// output[t] = LayerNorm(the first row that its references name, or its unigram's + the embedding of its position).
// Throws std::invalid_argument on whatever lies outside a table.
void causal_merge(const CausalMergeArguments& arguments, int num_threads);

}  // namespace hmi
