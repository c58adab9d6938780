// Arithmetic that the kernels share: conversions, vectors of eight 16-bit elements, warp sums, activations.
#pragma once

#include "common/data_type.h"
#include "cuda/device.cuh"

namespace hmi::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__host__ __device__ constexpr int64_t ceil_div(int64_t numerator, int64_t denominator) {
  return (numerator + denominator - 1) / denominator;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class Element>
__device__ __forceinline__ Element from_float(float value) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

// 16 bytes as elements. Copied, never cast: a cast breaks the aliasing rules that compilers build upon.
template <class Element>
struct Vector16 {
  static constexpr int kSize = 16 / sizeof(Element);
  Element elements[kSize];
};

template <class Element>
__device__ __forceinline__ Vector16<Element> unpack(const uint4& bytes) {
  Vector16<Element> vector;
  static_assert(sizeof(vector) == sizeof(bytes));
  __builtin_memcpy(&vector, &bytes, sizeof(bytes));
  return vector;
}

template <class Element>
__device__ __forceinline__ uint4 pack(const Vector16<Element>& vector) {
  uint4 bytes;
  __builtin_memcpy(&bytes, &vector, sizeof(bytes));
  return bytes;
}

// Every lane gets the sum over the warp, made in the same order in each launch.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

// The activations of hmi_kernels.ACTIVATIONS by their numbers (csrc/cpu/simd/simd_kernels.h has the same).
enum Activation : int32_t { kRelu, kGelu, kSilu, kGeluTanh, kTanh, kNumActivations, kIdentity = -1 };

__device__ __forceinline__ float activate(int32_t activation, float x) {
  switch (activation) {
    case kRelu:
      return x < 0.0f ? 0.0f : x;  // keeps NaN
    case kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    case kSilu:
      return x / (1.0f + expf(-x));
    case kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case kTanh:
      return tanhf(x);
    default:
      return x;
  }
}

}  // namespace hmi::cuda
