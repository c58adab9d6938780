// The device's functions that plain C++ lacks, under CUDA's names.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator/collectives.h"
#include "emulator/launch.h"

namespace emulator {

// By value: a reference would leave the load to the kernel's code, which is observed.
EMULATOR_UNOBSERVED inline uint3 thread_index() { return current->index; }
EMULATOR_UNOBSERVED inline uint3 block_index() { return machine.block_index; }
EMULATOR_UNOBSERVED inline dim3 block_size() { return machine.grid->threads; }
EMULATOR_UNOBSERVED inline dim3 grid_size() { return machine.grid->blocks; }

template <class T>
T shuffle_value(unsigned mask, T value, int source, Place place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(mask, bits, source, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The first lane of this lane's part of the warp, if the warp is cut into parts of width lanes.
inline int part_begin(int width) { return lane_index() & ~(width - 1); }

}  // namespace emulator

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())
#define warpSize 32

inline void __syncthreads(emulator::Place place = emulator::Place::here()) { emulator::meet_block(false, place); }
inline int __syncthreads_count(int vote, emulator::Place place = emulator::Place::here()) {
  return emulator::meet_block(vote != 0, place);
}
inline int __syncthreads_or(int vote, emulator::Place place = emulator::Place::here()) {
  return emulator::meet_block(vote != 0, place) != 0;
}
inline int __syncthreads_and(int vote, emulator::Place place = emulator::Place::here()) {
  return emulator::meet_block(vote == 0, place) == 0;
}
inline void __syncwarp(unsigned mask = emulator::kAllLanes, emulator::Place place = emulator::Place::here()) {
  emulator::sync_warp(mask, place);
}

inline unsigned __ballot_sync(unsigned mask, int vote, emulator::Place place = emulator::Place::here()) {
  return emulator::ballot(mask, vote != 0, place);
}
inline int __any_sync(unsigned mask, int vote, emulator::Place place = emulator::Place::here()) {
  return emulator::ballot(mask, vote != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int vote, emulator::Place place = emulator::Place::here()) {
  return emulator::ballot(mask, vote == 0, place) == 0;
}
// Any set of lanes that includes one's own is a legal answer; this is the least helpful.
inline unsigned __activemask() { return 1u << emulator::lane_index(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              emulator::Place place = emulator::Place::here()) {
  return emulator::shuffle_value(mask, value, emulator::part_begin(width) | (source & (width - 1)), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  emulator::Place place = emulator::Place::here()) {
  const int source = emulator::lane_index() ^ lane_mask;
  return emulator::shuffle_value(mask, value, source < emulator::part_begin(width) + width ? source : -1, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32,
                   emulator::Place place = emulator::Place::here()) {
  const int source = emulator::lane_index() + static_cast<int>(distance);
  return emulator::shuffle_value(mask, value, source < emulator::part_begin(width) + width ? source : -1, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32,
                 emulator::Place place = emulator::Place::here()) {
  const int source = emulator::lane_index() - static_cast<int>(distance);
  return emulator::shuffle_value(mask, value, source >= emulator::part_begin(width) ? source : -1, place);
}

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float numerator, float denominator) { return numerator / denominator; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}

namespace emulator {
template <class To, class From>
To same_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}
}  // namespace emulator

inline float __int_as_float(int x) { return emulator::same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::same_bits<float>(x); }
inline int __float_as_int(float x) { return emulator::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator::same_bits<unsigned>(x); }

using std::max;
using std::min;
