// Sixteen floats in a register.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace hmi {
namespace {

constexpr int kLanes = 16;
constexpr int kMaxTileVectors = 4;
using Vector = __m512;

// Rows of a register tile that is `vectors` wide, and its sums for each element: 32 registers hold the sums, one row of weights and one broadcast.
constexpr int tile_chains(int vectors) { return vectors == 1 ? 4 : vectors == 2 ? 2 : 1; }
constexpr int max_tile_rows(int vectors) { return vectors == 3 ? 8 : 6; }

inline __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Vector zero() { return _mm512_setzero_ps(); }
inline Vector broadcast(float value) { return _mm512_set1_ps(value); }
inline Vector load(const float* from) { return _mm512_loadu_ps(from); }
inline Vector load_first(const float* from, int count) { return _mm512_maskz_loadu_ps(first(count), from); }
inline Vector load(const uint16_t* half) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)));
}
inline Vector load_first(const uint16_t* half, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), half));
}
inline Vector load(const int8_t* from) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline Vector load_first(const int8_t* from, int count) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(count), from)));
}
// Four pieces of four halves, or two of eight, one after the other.
inline Vector load_joined(const uint16_t* const (&pieces)[4]) {
  __m128i quarters[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) quarters[i] = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pieces[i]));
  const __m128i low = _mm_unpacklo_epi64(quarters[0], quarters[1]);
  const __m128i high = _mm_unpacklo_epi64(quarters[2], quarters[3]);
  return _mm512_cvtph_ps(_mm256_set_m128i(high, low));
}
inline Vector load_joined(const uint16_t* const (&pieces)[2]) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pieces[0]));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pieces[1]));
  return _mm512_cvtph_ps(_mm256_set_m128i(high, low));
}
inline void store(float* to, Vector value) { _mm512_storeu_ps(to, value); }
inline void store_first(float* to, Vector value, int count) { _mm512_mask_storeu_ps(to, first(count), value); }
inline Vector keep_first(Vector value, int count) { return _mm512_maskz_mov_ps(first(count), value); }

inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector subtract(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector multiply(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector divide(Vector a, Vector b) { return _mm512_div_ps(a, b); }
inline Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
// NOTE: if either is NaN both give the second operand.
inline Vector minimum(Vector a, Vector b) { return _mm512_min_ps(a, b); }
inline Vector maximum(Vector a, Vector b) { return _mm512_max_ps(a, b); }
inline Vector round_to_integer(Vector a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2 to the power of an integer in [-126, 127].
inline Vector power_of_two(Vector exponent) {
  const __m512i biased = _mm512_add_epi32(_mm512_cvtps_epi32(exponent), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}
inline Vector magnitude(Vector a) { return _mm512_abs_ps(a); }
inline Vector with_sign_of(Vector size, Vector sign) {
  return _mm512_or_ps(size, _mm512_and_ps(sign, _mm512_set1_ps(-0.0f)));
}
inline float sum(Vector a) { return _mm512_reduce_add_ps(a); }

}  // namespace
}  // namespace hmi
