// From rows to hidden states on the device: see csrc/cpu/plot_merge.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/data_type.h"

namespace hmi::cuda {

constexpr int kMaxTables = 48;  // of each kind; they travel as kernel parameters, of which there are 4 KiB

// Device memory, or pinned host memory that the device reads in place.
struct DeviceTable {
  const void* rows;
  // For int8 floats [num_rows, window], the scales; for codes halves [window, hidden_size / piece_size, 256, piece_size],
  // as in csrc/cpu/plot_merge.h; else null.
  const void* decoding;
  int64_t num_rows;
  DataType data_type;
  int32_t piece_size;  // of codes: 4 or 8
};

struct PlotMergeArguments {
  const int32_t* input_ids;
  int64_t num_tokens;
  const int64_t* sequence_offsets;
  int64_t num_sequences;
  const int64_t* references;       // as plot_lookup gives them
  DeviceTable row_tables[kMaxTables];      // [num_rows, window, hidden_size] each
  int32_t num_row_tables;
  DeviceTable unigram_tables[kMaxTables];  // [vocabulary, 3, hidden_size] each, of floats
  int32_t num_unigram_tables;
  const int32_t* sequence_unigram_tables;  // [num_sequences]
  DataType data_type;                // of position_embeddings, layer norm and output: floats
  const void* position_embeddings;   // [num_positions, hidden_size]
  int64_t num_positions;
  const void* layer_norm_weight;
  const void* layer_norm_bias;
  float layer_norm_epsilon;
  int32_t window;  // 2 or 3
  int32_t hidden_size;
  void* output;  // [num_tokens, hidden_size]
  unsigned long long* fault;
};

// Sums and the layer norm in float32, rounded once, at the end. A token that needs a row which its table does not have
// gets zeros. hidden_size is a multiple of 8, up to 4096; all tensors begin at multiples of 16 bytes.
cudaError_t plot_merge(const PlotMergeArguments& arguments, cudaStream_t stream);

}  // namespace hmi::cuda
