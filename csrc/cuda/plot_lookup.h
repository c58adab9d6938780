// The look-up of a batch in PLOT indexes that lie on the device: see csrc/cpu/plot_lookup.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cpu/plot_index.h"

namespace hmi::cuda {

constexpr int kMaxIndexes = 128;  // they travel as kernel parameters, of which there are 4 KiB

struct DeviceIndex {
  const IndexSlot* slots;
  int64_t capacity_bits;  // of 2 ** capacity_bits slots
};

struct PlotLookupArguments {
  const int32_t* input_ids;
  int64_t num_tokens;
  const int64_t* sequence_offsets;
  int64_t num_sequences;
  DeviceIndex indexes[kMaxIndexes];
  int32_t num_indexes;
  const int32_t* chains;  // [num_sequences, chain_width]
  int32_t chain_width;
  int32_t window;       // 2 or 3
  int64_t* references;  // [num_tokens, 1 or 3]
  unsigned long long* fault;
};

// A token whose id or sequence is out of bounds gets -1; a chain ends at an entry that names no index.
cudaError_t plot_lookup(const PlotLookupArguments& arguments, cudaStream_t stream);

}  // namespace hmi::cuda
