// How a thread of the GEMV kernels draws a matrix in: units of 16 bytes (eight neighboring columns of a row), a batch
// of them under way while the batch before is being multiplied.
#pragma once

#include "cuda/grouped_adapter_gemv.h"
#include "cuda/numeric.cuh"

namespace hmi::cuda {

constexpr int kStreamBatch = 4;  // units under way per thread, and as many being multiplied

// Units 0 .. count - 1, `stride` elements apart. The first batch is asked for at once: make a stream before waiting for
// what its weights are to be multiplied with.
template <class Element>
class WeightStream {
 public:
  __device__ __forceinline__ WeightStream(const Element* first, int stride, int count)
      : next_(first), stride_(stride), left_(count) {
    fetch();
  }

  // The number of units in `units` from now on, 0 at the end.
  __device__ __forceinline__ int take(uint4 (&units)[kStreamBatch]) {
    const int taken = left_ < kStreamBatch ? left_ : kStreamBatch;
#pragma unroll
    for (int b = 0; b < kStreamBatch; ++b) units[b] = batch_[b];
    left_ -= taken;
    next_ += kStreamBatch * stride_;
    fetch();
    return taken;
  }

 private:
  __device__ __forceinline__ void fetch() {
#pragma unroll
    for (int b = 0; b < kStreamBatch; ++b) {
      batch_[b] = b < left_ ? load16_once(next_ + b * stride_) : uint4{};
    }
  }

  const Element* next_;
  int stride_;
  int left_;  // not taken yet
  uint4 batch_[kStreamBatch];
};

// sums[g][j] += factor(g, i) * element j of unit i, over all units in their order.
template <class Element, int kTokens, class Factor>
__device__ __forceinline__ void multiply(WeightStream<Element>& weights, const Factor& factor,
                                         float (&sums)[kTokens][kGemvUnit]) {
  uint4 units[kStreamBatch];
#pragma unroll 1
  for (int first = 0; const int taken = weights.take(units); first += kStreamBatch) {
#pragma unroll
    for (int b = 0; b < kStreamBatch; ++b) {
      if (b >= taken) break;
      const Vector16<Element> weight = unpack<Element>(units[b]);
#pragma unroll
      for (int g = 0; g < kTokens; ++g) {
        const float times = factor(g, first + b);
#pragma unroll
        for (int j = 0; j < kGemvUnit; ++j) sums[g][j] += times * to_float(weight.elements[j]);
      }
    }
  }
}

}  // namespace hmi::cuda
