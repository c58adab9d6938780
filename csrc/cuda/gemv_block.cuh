// What a block of the GEMV kernels works on: a group of a segment's tokens, and its shared memory.
#pragma once

#include "cuda/adapter_slot.cuh"
#include "cuda/grouped_adapter_gemv.h"
#include "cuda/numeric.cuh"

namespace hmi::cuda {

constexpr int kGemvWarps = kGemvThreads / kWarpSize;
static_assert(kGemvWarps == kGemvUnit, "each warp sums the columns of one place in a unit");

struct TokenGroup {
  int64_t first;
  int tokens;  // at most kTokens; places without a token hold zeros and are never stored
};

// See gemv_shared_bytes.
template <class Element, int kTokens>
struct GemvShared {
  float* partials;  // [kTokens][kGemvUnit][kGemvThreads]
  float* inner;     // [kTokens][kGemvUnit][kInnerPitch]
  Element* rows;    // [kTokens][row_elements]: inputs, later finished rows before their layer norm

  __device__ __forceinline__ explicit GemvShared(unsigned char* bytes)
      : partials(reinterpret_cast<float*>(bytes)),
        inner(partials + kTokens * kGemvUnit * kGemvThreads),
        rows(reinterpret_cast<Element*>(inner + kTokens * kGemvUnit * kInnerPitch)) {}

  __device__ __forceinline__ float& partial(int token, int place) const {
    return partials[(token * kGemvUnit + place) * kGemvThreads + threadIdx.x];
  }
  __device__ __forceinline__ float& inner_at(int token, int column) const {
    return inner[(token * kGemvUnit + column % kGemvUnit) * kInnerPitch + column / kGemvUnit];
  }
};

// Sum over the rows that each thread had, plus the bias, activated and rounded as the second product takes it.
template <class Element>
__device__ __forceinline__ float finish_inner(const AdapterSlot<Element>& slot, float sum, float bias) {
  return to_float(from_float<Element>(activate(slot.activation, sum + bias)));
}

}  // namespace hmi::cuda
