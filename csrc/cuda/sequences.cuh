// From a token to its sequence, in device memory that may hold anything. A block finds the sequences of its first and
// last token with whole warps, 32 probes at once; each token then searches between these two, which are close.
#pragma once

#include "cuda/fault.h"
#include "cuda/numeric.cuh"

namespace hmi::cuda {

struct DeviceSequences {
  const int64_t* offsets;  // [num_sequences + 1]
  int64_t num_sequences;
  int64_t num_tokens;
};

struct TokenSequence {
  int64_t index;  // -1: the offsets give the token none
  int64_t begin;
  int64_t end;  // begin <= token < end, and both lie in 0..num_tokens
};

// Called by whole warps with one token: every lane gets the last sequence that does not begin after it.
__device__ __forceinline__ int64_t find_sequence_by_warp(const DeviceSequences& sequences, int64_t token) {
  const int lane = threadIdx.x % kWarpSize;
  int64_t low = 0, high = sequences.num_sequences;
  while (high - low > 1) {
    const int64_t step = ceil_div(high - low, kWarpSize);
    const int64_t probe = low + lane * step;
    const unsigned votes = __ballot_sync(kFullWarp, probe < high && sequences.offsets[probe] <= token);
    if (votes == 0) return low;  // only if they do not begin at 0
    low += (kWarpSize - 1 - __clz(static_cast<int>(votes))) * step;
    high = high < low + step ? high : low + step;
  }
  return low;
}

// The token's sequence among [first, last]; a fault if the offsets there do not hold it.
__device__ __forceinline__ TokenSequence find_sequence(const DeviceSequences& sequences, int64_t first, int64_t last,
                                                       int64_t token, unsigned long long* fault) {
  if (sequences.num_sequences == 0) {
    report_fault(fault, fault_word(Fault::kSequenceOffsets, 0));
    return {-1, 0, 0};
  }
  int64_t low = first, high = last + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    (sequences.offsets[middle] <= token ? low : high) = middle;
  }
  const int64_t begin = sequences.offsets[low], end = sequences.offsets[low + 1];
  if (begin >= 0 && begin <= token && token < end && end <= sequences.num_tokens) return {low, begin, end};
  report_fault(fault, fault_word(Fault::kSequenceOffsets, low));
  return {-1, 0, 0};
}

// The searches above may miss that offsets decrease somewhere: all threads of the grid together look at all of them.
__device__ __forceinline__ void check_offsets_rise(const DeviceSequences& sequences, unsigned long long* fault) {
  const int64_t num_threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t s = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; s < sequences.num_sequences; s += num_threads) {
    if (sequences.offsets[s] > sequences.offsets[s + 1]) {
      report_fault(fault, fault_word(Fault::kSequenceOffsets, s));
    }
  }
}

}  // namespace hmi::cuda
