// A block's 64 x 64 tile of a matrix product on tensor cores, whose operands lie in global memory with either side
// first: the building block of products that read a factor as it is or transposed without ever storing a transpose.
#pragma once

#include "cuda/swizzled_tile.cuh"

namespace hmi::cuda {

// A matrix of 16-bit elements in global memory of which a tile is read: rows x columns from `start` on are there (not
// negative; what lies beyond reads as zero). Rows begin at multiples of 16 bytes; columns is a multiple of 8.
template <class Element>
struct TileSource {
  const Element* start;
  int64_t stride;
  int64_t rows;
  int64_t columns;
};

// sums[64 x 64] += left[64 x depth] @ right[depth x 64], where left is stored [64, depth], or with kIsLeftTransposed
// [depth, 64]; and right [depth, 64], or with kIsRightTransposed [64, depth]. Four warps, each with a quarter of
// 32 x 32. The depth arrives by cp.async in chunks of 64, one ahead.
template <class Element, bool kIsLeftTransposed, bool kIsRightTransposed>
class TileProduct {
 public:
  static constexpr int kSize = 64;
  static constexpr int kThreads = 128;
  static constexpr int kStages = 2;
  static constexpr int kTileBytes = kSize * kSize * 2;
  static constexpr int kSharedBytes = kStages * 2 * kTileBytes;

  __device__ __forceinline__ explicit TileProduct(unsigned char* shared) : shared_(shared) {}

  // Called by all threads of the block. Shared memory is free again when it returns.
  __device__ __forceinline__ void add(const TileSource<Element>& left, const TileSource<Element>& right,
                                      int64_t depth) {
    const int64_t chunks = ceil_div(depth, kSize);
    copy_chunk(left, right, 0);
    cp_async_commit();
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (chunk + 1 < chunks) copy_chunk(left, right, chunk + 1);
      cp_async_commit();  // perhaps an empty group, so that the wait below always leaves one under way
      cp_async_wait<1>();
      __syncthreads();
      multiply(static_cast<int>(chunk % kStages));
      __syncthreads();  // before the next copies overwrite what was read
    }
  }

  // Calls store(row, column, first, second) for pairs of neighbouring columns of the tile.
  template <class Store>
  __device__ __forceinline__ void for_each_pair(const Store& store) const {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float(&sums)[4] = sums_[i][j][half];
          const int row = first_row() + i * kTensorTile + lane / 4;
          const int column = first_column() + j * kTensorTile + half * 8 + lane % 4 * 2;
          store(row, column, sums[0], sums[1]);
          store(row + 8, column, sums[2], sums[3]);
        }
      }
    }
  }

 private:
  static constexpr int kLogUnits = 3;  // rows of 64 elements
  static constexpr int kUnits = 1 << kLogUnits;

  __device__ __forceinline__ static int first_row() { return static_cast<int>(threadIdx.x) / kWarpSize / 2 * 32; }
  __device__ __forceinline__ static int first_column() { return static_cast<int>(threadIdx.x) / kWarpSize % 2 * 32; }

  __device__ __forceinline__ SwizzledTile tile(int stage, int operand) const {
    return {shared_ + (stage * 2 + operand) * kTileBytes, kLogUnits};
  }

  // Starts the copies of one chunk of both operands.
  __device__ __forceinline__ void copy_chunk(const TileSource<Element>& left, const TileSource<Element>& right,
                                             int64_t chunk) const {
    const int stage = static_cast<int>(chunk % kStages);
    const int64_t depth = chunk * kSize;
    copy_tile(tile(stage, 0), left, kIsLeftTransposed ? depth : 0, kIsLeftTransposed ? 0 : depth);
    copy_tile(tile(stage, 1), right, kIsRightTransposed ? 0 : depth, kIsRightTransposed ? depth : 0);
  }

  __device__ __forceinline__ static void copy_tile(const SwizzledTile& to, const TileSource<Element>& from, int64_t row,
                                                   int64_t column) {
    for (int i = threadIdx.x; i < kSize * kUnits; i += kThreads) {
      const int r = i / kUnits, unit = i % kUnits;
      const int64_t source_row = row + r, source_column = column + unit * kUnitElements;
      const bool is_there = source_row < from.rows && source_column < from.columns;
      const Element* source = from.start + (is_there ? source_row * from.stride + source_column : 0);
      cp_async16(to.unit(r, unit), source, is_there);
    }
  }

  __device__ __forceinline__ void multiply(int stage) {
    const SwizzledTile left = tile(stage, 0), right = tile(stage, 1);
#pragma unroll
    for (int step = 0; step < kSize / kTensorTile; ++step) {
      unsigned rows[2][4], columns[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_rows(rows[i], left, first_row() + i * kTensorTile, step);
#pragma unroll
      for (int j = 0; j < 2; ++j) load_columns(columns[j], right, first_column() / kTensorTile + j, step);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) multiply_add<Element>(sums_[i][j], rows[i], columns[j]);
      }
    }
  }

  __device__ __forceinline__ static void load_rows(unsigned (&operand)[4], const SwizzledTile& tile, int row,
                                                   int step) {
    if constexpr (!kIsLeftTransposed) {
      load_left(operand, tile, row, step);
    } else {
      // The matrices of load_left (upper and lower rows at the first depth, then at the second), each transposed.
      const int lane = threadIdx.x % kWarpSize;
      const int depth = step * kTensorTile + lane / 16 * 8 + lane % 8;
      ldmatrix_x4_transposed(operand, tile.unit(depth, row / kUnitElements + lane / 8 % 2));
    }
  }

  __device__ __forceinline__ static void load_columns(unsigned (&operands)[4], const SwizzledTile& tile, int group,
                                                      int step) {
    if constexpr (!kIsRightTransposed) {
      load_right(operands, tile, step, group);
    } else {
      // The matrices of load_right (first and second depth at the first columns, then at the next), which lie
      // transposed already.
      const int lane = threadIdx.x % kWarpSize;
      const int column = group * kTensorTile + lane / 16 * 8 + lane % 8;
      ldmatrix_x4(operands, tile.unit(column, 2 * step + lane / 8 % 2));
    }
  }

  unsigned char* shared_;
  float sums_[2][2][2][4] = {};
};

}  // namespace hmi::cuda
