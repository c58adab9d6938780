// Four floats in the compiler's own vector type: SSE2 on x86-64, NEON on aarch64, plain code elsewhere.
#pragma once

#include <stdint.h>

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace hmi {
namespace {

constexpr int kLanes = 4;
constexpr int kMaxTileVectors = 2;
using Vector = float __attribute__((vector_size(16)));
using IntegerVector = int32_t __attribute__((vector_size(16)));

// Rows of a register tile that is `vectors` wide, and its sums for each element, for 16 registers.
constexpr int tile_chains(int vectors) { return vectors == 1 ? 4 : 1; }
constexpr int max_tile_rows(int vectors) { return vectors == 1 ? 3 : 6; }

inline Vector zero() { return Vector{0, 0, 0, 0}; }
inline Vector broadcast(float value) { return Vector{value, value, value, value}; }
inline Vector load(const float* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}
inline Vector load_first(const float* from, int count) {
  Vector value = zero();
  for (int i = 0; i < count; ++i) value[i] = from[i];
  return value;
}
// Moves exponent and mantissa into their float32 places and corrects the exponent's bias by a multiplication, which
// also normalizes subnormals; infinities and NaN are given the highest exponent.
inline Vector from_half(IntegerVector half) {
  const Vector size = reinterpret_cast<Vector>((half & 0x7FFF) << 13) * broadcast(0x1p112f);
  const IntegerVector is_special = (half & 0x7C00) == 0x7C00;
  const IntegerVector bits = reinterpret_cast<IntegerVector>(size) | (is_special & 0x7F800000) | ((half & 0x8000) << 16);
  return reinterpret_cast<Vector>(bits);
}
inline Vector load(const uint16_t* half) { return from_half(IntegerVector{half[0], half[1], half[2], half[3]}); }
inline Vector load_first(const uint16_t* half, int count) {
  IntegerVector value = {0, 0, 0, 0};
  for (int i = 0; i < count; ++i) value[i] = half[i];
  return from_half(value);
}
inline Vector load(const int8_t* from) {
  return __builtin_convertvector((IntegerVector{from[0], from[1], from[2], from[3]}), Vector);
}
inline Vector load_first(const int8_t* from, int count) {
  Vector value = zero();
  for (int i = 0; i < count; ++i) value[i] = static_cast<float>(from[i]);
  return value;
}
inline void store(float* to, Vector value) { __builtin_memcpy(to, &value, sizeof(value)); }
inline void store_first(float* to, Vector value, int count) {
  for (int i = 0; i < count; ++i) to[i] = value[i];
}
inline Vector keep_first(Vector value, int count) {
  return reinterpret_cast<Vector>(reinterpret_cast<IntegerVector>(value) & (IntegerVector{0, 1, 2, 3} < count));
}

inline Vector add(Vector a, Vector b) { return a + b; }
inline Vector subtract(Vector a, Vector b) { return a - b; }
inline Vector multiply(Vector a, Vector b) { return a * b; }
inline Vector divide(Vector a, Vector b) { return a / b; }
#if defined(__aarch64__)
inline Vector multiply_add(Vector a, Vector b, Vector c) { return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#else
inline Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
#endif
// NOTE: if either is NaN both give the second operand.
inline Vector minimum(Vector a, Vector b) { return a < b ? a : b; }
inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }
inline Vector round_to_integer(Vector a) {
  const Vector shift = broadcast(0x1.8p23f);  // leaves no room for a fraction
  return (a + shift) - shift;
}
// 2 to the power of an integer in [-126, 127].
inline Vector power_of_two(Vector exponent) {
  const IntegerVector biased = __builtin_convertvector(exponent, IntegerVector) + 127;
  return reinterpret_cast<Vector>(biased << 23);
}
inline Vector magnitude(Vector a) { return reinterpret_cast<Vector>(reinterpret_cast<IntegerVector>(a) & 0x7FFFFFFF); }
inline Vector with_sign_of(Vector size, Vector sign) {
  return reinterpret_cast<Vector>(reinterpret_cast<IntegerVector>(size) |
                                  (reinterpret_cast<IntegerVector>(sign) & INT32_MIN));
}
inline float sum(Vector a) { return (a[0] + a[2]) + (a[1] + a[3]); }

}  // namespace
}  // namespace hmi
