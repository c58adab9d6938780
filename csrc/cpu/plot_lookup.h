// From tokens to rows: forms the n-gram of every position and searches it in the sequence's chain of tables.
#pragma once

#include <cstdint>
#include <vector>

#include "common/packed_sequences.h"
#include "cpu/plot_index.h"

namespace hmi {

constexpr int kRowBits = 40;  // a row reference is table << kRowBits | row, or kMissing

struct PlotLookupArguments {
  PackedSequences sequences;
  const std::vector<PlotIndex>& indexes;
  const int32_t* chains;  // [num_sequences, chain_width]: tables to search in this order, padded with -1
  int64_t chain_width;
  int window;           // 2 or 3
  int64_t* references;  // [num_tokens, 1] for window 2; [num_tokens, 3] for window 3: full, left and right bigram
};

// Throws std::invalid_argument on bad offsets, on a token id that no key can hold and on a table id that does not exist.
void plot_lookup(const PlotLookupArguments& arguments, int num_threads);

}  // namespace hmi
