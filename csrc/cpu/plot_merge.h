// From rows to hidden states: gathers what each token's windows say of it, adds its position, normalizes.
#pragma once

#include <cstdint>
#include <vector>

#include "common/packed_sequences.h"
#include "cpu/row_table.h"

namespace hmi {

// Each token has so many unigram rows. For window 3 they are numbered like the slots of windows, for window 2 so:
constexpr int kUnigramSlots = 3;
enum UnigramSlot { kAlone, kBesideLeftMask, kBesideRightMask };

struct PlotMergeArguments {
  PackedSequences sequences;
  const int64_t* references;                  // as plot_lookup gives them
  const std::vector<RowTable>& row_tables;      // [num_rows, window, hidden_size] each
  const std::vector<RowTable>& unigram_tables;  // [vocabulary, 3, hidden_size] each, of floats
  const int32_t* sequence_unigram_tables;       // [num_sequences]
  const float* position_embeddings;             // [num_positions, hidden_size]
  int64_t num_positions;
  const float* layer_norm_weight;
  const float* layer_norm_bias;
  float layer_norm_epsilon;
  int window;  // 2 or 3
  int64_t hidden_size;
  float* output;  // [num_tokens, hidden_size]
};

// With R(t) the row of the window at token t and U its unigram rows,
//   window 2: m(t) = R(t-1)[1] + R(t)[0] - U[0]; where a window is missing, U[1] and U[2] stand for its row; at an end
//     of the sequence the other part alone, or U[0]
//   window 3: m(t) = R(t)[1] + R(t-1)[2] + R(t+1)[0]; a missing R is composed of the left and the right bigram's rows,
//     and of U in their slots where they are missing too
// and output(t) = LayerNorm(m(t) + position). Throws std::invalid_argument on whatever lies outside a table.
void plot_merge(const PlotMergeArguments& arguments, int num_threads);

}  // namespace hmi
