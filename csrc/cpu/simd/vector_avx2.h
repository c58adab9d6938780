// Eight floats in a register.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace hmi {
namespace {

constexpr int kLanes = 8;
constexpr int kMaxTileVectors = 2;
using Vector = __m256;

// Rows of a register tile that is `vectors` wide, and its sums for each element: 16 registers hold the sums, one row of weights and one broadcast.
constexpr int tile_chains(int vectors) { return vectors == 1 ? 4 : 1; }
constexpr int max_tile_rows(int vectors) { return vectors == 1 ? 3 : 6; }

alignas(32) constexpr int32_t kLaneMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

inline __m256i first(int count) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kLaneMasks + kLanes - count));
}

inline Vector zero() { return _mm256_setzero_ps(); }
inline Vector broadcast(float value) { return _mm256_set1_ps(value); }
inline Vector load(const float* from) { return _mm256_loadu_ps(from); }
inline Vector load_first(const float* from, int count) { return _mm256_maskload_ps(from, first(count)); }
inline Vector load(const uint16_t* half) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half)));
}
inline Vector load_first(const uint16_t* half, int count) {
  alignas(16) uint16_t padded[kLanes] = {};
  for (int i = 0; i < count; ++i) padded[i] = half[i];
  return load(padded);
}
inline Vector load(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
}
inline Vector load_first(const int8_t* from, int count) {
  alignas(8) int8_t padded[kLanes] = {};
  for (int i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}
// Pieces of four halves each, one after the other.
inline Vector load_joined(const uint16_t* const (&pieces)[2]) {
  const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pieces[0]));
  const __m128i high = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pieces[1]));
  return _mm256_cvtph_ps(_mm_unpacklo_epi64(low, high));
}
inline void store(float* to, Vector value) { _mm256_storeu_ps(to, value); }
inline void store_first(float* to, Vector value, int count) { _mm256_maskstore_ps(to, first(count), value); }
inline Vector keep_first(Vector value, int count) { return _mm256_and_ps(value, _mm256_castsi256_ps(first(count))); }

inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector divide(Vector a, Vector b) { return _mm256_div_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
// NOTE: if either is NaN both give the second operand.
inline Vector minimum(Vector a, Vector b) { return _mm256_min_ps(a, b); }
inline Vector maximum(Vector a, Vector b) { return _mm256_max_ps(a, b); }
inline Vector round_to_integer(Vector a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2 to the power of an integer in [-126, 127].
inline Vector power_of_two(Vector exponent) {
  const __m256i biased = _mm256_add_epi32(_mm256_cvtps_epi32(exponent), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}
inline Vector magnitude(Vector a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vector with_sign_of(Vector size, Vector sign) {
  return _mm256_or_ps(size, _mm256_and_ps(sign, _mm256_set1_ps(-0.0f)));
}
inline float sum(Vector a) {
  __m128 folded = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  folded = _mm_add_ps(folded, _mm_movehl_ps(folded, folded));
  return _mm_cvtss_f32(_mm_add_ss(folded, _mm_shuffle_ps(folded, folded, 1)));
}

}  // namespace
}  // namespace hmi
