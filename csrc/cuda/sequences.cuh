// From a token to its sequence, in device memory that may hold anything. A warp finds the sequences of the first and
// the last token of a block with 32 probes at once for each; every token then searches between these two, which are
// close.
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

// A whole warp's search for the last sequence that does not begin after the token: it lies in [low, high).
struct WarpSearch {
  int64_t token;
  int64_t low;
  int64_t high;

  __device__ bool is_open() const { return high - low > 1; }
  __device__ int64_t step() const { return ceil_div(high - low, kWarpSize); }
  __device__ int64_t load(const int64_t* offsets) const {
    const int64_t probe = low + threadIdx.x % kWarpSize * step();
    return probe < high ? offsets[probe] : INT64_MAX;
  }
  // With what load() gave this lane.
  __device__ void narrow(int64_t begin) {
    const int64_t width = step();
    const unsigned votes = __ballot_sync(kFullWarp, begin <= token);
    // No votes: only if the sequences do not begin at 0.
    low += votes == 0 ? 0 : (kWarpSize - 1 - __clz(static_cast<int>(votes))) * width;
    high = high < low + width ? high : low + width;
  }
};

struct SequenceRange {
  int64_t first;
  int64_t last;
};

// Called by whole warps: every lane gets the sequences of both tokens.
__device__ __forceinline__ SequenceRange find_sequences_by_warp(const DeviceSequences& sequences, int64_t first_token,
                                                                int64_t last_token) {
  WarpSearch first = {first_token, 0, sequences.num_sequences};
  WarpSearch last = {last_token, 0, sequences.num_sequences};
  while (first.is_open() || last.is_open()) {
    const int64_t first_begin = first.load(sequences.offsets), last_begin = last.load(sequences.offsets);
    first.narrow(first_begin);
    last.narrow(last_begin);
  }
  return {first.low, last.low};
}

// The token's sequence in the range; a fault if the offsets there do not hold it.
__device__ __forceinline__ TokenSequence find_sequence(const DeviceSequences& sequences, const SequenceRange& range,
                                                       int64_t token, unsigned long long* fault) {
  if (sequences.num_sequences == 0) {
    report_fault(fault, fault_word(Fault::kSequenceOffsets, 0));
    return {-1, 0, 0};
  }
  int64_t low = range.first, high = range.last + 1;
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
// Called last, so that nothing waits for it.
__device__ __forceinline__ void check_offsets_rise(const DeviceSequences& sequences, unsigned long long* fault) {
  const int64_t num_threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t s = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; s < sequences.num_sequences; s += num_threads) {
    if (sequences.offsets[s] > sequences.offsets[s + 1]) {
      report_fault(fault, fault_word(Fault::kSequenceOffsets, s));
    }
  }
}

}  // namespace hmi::cuda
