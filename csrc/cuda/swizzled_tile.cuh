// A matrix of 16-bit elements in shared memory whose 16-byte units are permuted so that no access has a bank conflict:
// not the copies that fill it (8 lanes write 8 neighbouring units), nor ldmatrix, plain or transposed (8 rows at one
// unit), nor the pairs of elements that a tensor core's accumulators hold (8 rows, 4 lanes within a unit).
#pragma once

#include "cuda/adapter_tile_shape.h"
#include "cuda/numeric.cuh"

namespace hmi::cuda {

// Rows of 2^log_units units. The banks hold a line of 8 units: a whole row, a part of it, or several short rows. A
// unit's place within its line is its number xor the line's, as far as the row has units; and then xor `turn` (0..7),
// by which tiles may differ whose rows are read together.
struct SwizzledTile {
  unsigned char* bytes;
  int log_units;
  int turn = 0;

  __device__ __forceinline__ unsigned char* unit(int row, int unit) const {
    const int line = log_units < 3 ? row >> (3 - log_units) : row;
    const int places = log_units < 3 ? (1 << log_units) - 1 : 7;
    return bytes + ((((row << log_units) + (unit ^ (line & places))) ^ turn) << 4);
  }
};

// 16 rows and the 16 columns of a depth step, as the left operand of a product.
__device__ __forceinline__ void load_left(unsigned (&operand)[4], const SwizzledTile& tile, int row, int step) {
  const int lane = threadIdx.x % kWarpSize;
  ldmatrix_x4(operand, tile.unit(row + lane % 16, 2 * step + lane / 16));
}

// The 16 rows of a depth step and 16 columns, as the right operands of two products.
__device__ __forceinline__ void load_right(unsigned (&operands)[4], const SwizzledTile& tile, int step, int group) {
  const int lane = threadIdx.x % kWarpSize;
  ldmatrix_x4_transposed(operands, tile.unit(step * kTensorTile + lane % 16, 2 * group + lane / 16));
}

// sums[16 x 16] += left[16 x 16] @ right[16 x 16]
template <class Element>
__device__ __forceinline__ void multiply_add(float (&sums)[2][4], const unsigned (&left)[4],
                                             const unsigned (&right)[4]) {
  const unsigned first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
  mma_m16n8k16<Element>(sums[0], left, first);
  mma_m16n8k16<Element>(sums[1], left, second);
}

// Two neighbouring elements of shared memory, whose bytes have no type of their own.
template <class Element>
struct alignas(4) Pair {
  Element elements[2];
};

template <class Element>
__device__ __forceinline__ float2 unpack_pair(unsigned word) {
  Pair<Element> pair;
  __builtin_memcpy(&pair, &word, sizeof(pair));
  return {to_float(pair.elements[0]), to_float(pair.elements[1])};
}

template <class Element>
__device__ __forceinline__ unsigned pack_pair(float first, float second) {
  const Pair<Element> pair{{from_float<Element>(first), from_float<Element>(second)}};
  unsigned word;
  __builtin_memcpy(&word, &pair, sizeof(pair));
  return word;
}

template <class Element>
__device__ __forceinline__ float2 load_pair(const unsigned char* bytes) {
  return unpack_pair<Element>(*reinterpret_cast<const unsigned*>(bytes));
}

template <class Element>
__device__ __forceinline__ void store_pair(unsigned char* bytes, float first, float second) {
  *reinterpret_cast<unsigned*>(bytes) = pack_pair<Element>(first, second);
}

__device__ __forceinline__ uint4 load_unit(const unsigned char* bytes) {
  return *reinterpret_cast<const uint4*>(bytes);
}
__device__ __forceinline__ void store_unit(unsigned char* bytes, const uint4& value) {
  *reinterpret_cast<uint4*>(bytes) = value;
}

}  // namespace hmi::cuda
