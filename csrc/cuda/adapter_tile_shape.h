// The shape of one block of the tile kernel, what its warps do, and its shared memory: one formula for the plan, which
// runs on the host, and for the kernel.
#pragma once

#include <cstdint>

#include "cuda/grouped_adapter.h"

namespace hmi::cuda {

constexpr int kTensorTile = 16;          // rows, columns and depth of what a warp multiplies at once
constexpr int kUnitElements = 8;         // a unit is 16 bytes: what cp.async copies and ldmatrix reads
constexpr int kMaxSharedBytes = 163 * 1024;  // of one block on sm_80; sm_90 has more

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

struct TileShape {
  int32_t rows;        // tokens of a block: 16, 32 or 64
  int32_t rank_class;  // inner columns that fit: 16, 32, 64, 128 or 256
  int32_t chunk;       // input columns, later output columns, of one stage of the ring: 16 or 64

  constexpr int warps() const { return rows == 64 && rank_class >= 128 ? 8 : 4; }
  constexpr int warps_across_rows() const { return rows / kTensorTile; }
  // The warps that share 16 rows. In the first product they split the ranks if each gets 32 or more, else the depth:
  // wide adapters so need few registers, narrow ones still use every warp. In the second they split the columns.
  constexpr int warps_per_row() const { return warps() / warps_across_rows(); }
  constexpr int warps_across_ranks() const {
    const int wanted = rank_class / 32 > 1 ? rank_class / 32 : 1;
    return wanted < warps_per_row() ? wanted : warps_per_row();
  }
  constexpr int warps_across_depth() const { return warps_per_row() / warps_across_ranks(); }
  // Blocks that one multiprocessor's registers must hold: the compiler keeps to it.
  constexpr int min_blocks() const { return warps() == 8 ? 1 : rank_class == 256 ? 3 : 4; }
};

constexpr bool operator==(const TileShape& a, const TileShape& b) {
  return a.rows == b.rows && a.rank_class == b.rank_class && a.chunk == b.chunk;
}

// Where the parts lie, in bytes from the beginning of the dynamic shared memory.
struct TileMemory {
  int weights_bytes;  // of a stage: weights first, then columns of the rows (inputs; later outputs), then biases
  int columns_bytes;
  int stage_bytes;
  int finished_rows;  // 0; with a layer norm: chunks of [rows, chunk], the rows that it normalizes
  int ring;
  int inner;         // [rows, inner columns]
  int partial_sums;  // float32: what the warps across the depth, but for the first, have summed
  int down_bias;
  int statistics;  // mean and reciprocal deviation of each row
  int total;
};

// layer_norm_size: columns of a row, 0 without a layer norm.
constexpr TileMemory tile_memory(TileShape shape, int num_stages, int layer_norm_size) {
  TileMemory memory{};
  memory.weights_bytes = shape.chunk * shape.rank_class * 2;
  memory.columns_bytes = shape.rows * shape.chunk * 2;
  memory.stage_bytes = memory.weights_bytes + memory.columns_bytes + round_up(shape.chunk * 2, 128);
  memory.finished_rows = 0;
  memory.ring = shape.rows * round_up(layer_norm_size, shape.chunk) * 2;
  memory.inner = memory.ring + num_stages * memory.stage_bytes;
  memory.partial_sums = memory.inner + shape.rows * shape.rank_class * 2;
  memory.down_bias =
      memory.partial_sums + (shape.warps_across_depth() - 1) * shape.rows * shape.rank_class * int(sizeof(float));
  memory.statistics = memory.down_bias + shape.rank_class * 2;
  memory.total = memory.statistics + (layer_norm_size > 0 ? shape.rows * 2 * int(sizeof(float)) : 0);
  return memory;
}

// The kernel of slices (grouped_adapter_slices.cuh): every warp has a ring of its own, of chunks of 64 columns.
constexpr int kSliceWarps = 4;
constexpr int kSliceColumns = 64;

// Finished rows so wide have room for the partial sums at their end: until these are added, only first columns come.
constexpr int kWideRows = 1024;

constexpr TileMemory slice_memory(int rank_class, int num_stages, int layer_norm_size) {
  constexpr int rows = kTensorTile;
  const int partial_sums_bytes = kSliceWarps * rows * rank_class * int(sizeof(float));
  TileMemory memory{};
  memory.weights_bytes = kSliceColumns * rank_class * 2;
  memory.columns_bytes = rows * kSliceColumns * 2;
  memory.stage_bytes = round_up(memory.weights_bytes + memory.columns_bytes + kSliceColumns * 2, 128);
  memory.finished_rows = 0;
  memory.ring = rows * round_up(layer_norm_size, kSliceColumns) * 2;
  const bool are_wide = layer_norm_size > kWideRows;
  memory.inner = memory.ring + kSliceWarps * num_stages * memory.stage_bytes;
  memory.down_bias = memory.inner + rows * rank_class * 2;
  memory.partial_sums = are_wide ? memory.ring - partial_sums_bytes : memory.down_bias + rank_class * 2;
  memory.statistics = memory.down_bias + rank_class * 2 + (are_wide ? 0 : partial_sums_bytes);
  memory.total = memory.statistics + (layer_norm_size > 0 ? rows * 2 * int(sizeof(float)) : 0);
  return memory;
}

// Every shape that is compiled: rank class, stages.
#define HMI_ADAPTER_SLICES(X) X(16, 3) X(16, 2) X(32, 2) X(64, 2)

// The inner columns of all projections side by side, each padded to a whole tensor tile.
constexpr int inner_columns(int max_rank, int num_projections) {
  return round_up(max_rank, kTensorTile) * num_projections;
}

// Every shape that is compiled: what adapter_plan.cpp may choose and grouped_adapter_tiles.cu dispatches.
// Rows, rank class, chunk. The last is for layer norms over rows so wide that wider stages do not fit beside them.
#define HMI_ADAPTER_TILES(X)                                                                          \
  X(16, 32, 64) X(16, 64, 64) X(16, 128, 64) X(32, 128, 64) X(64, 128, 64) X(16, 256, 64) X(32, 256, 64) \
  X(64, 256, 64) X(16, 256, 16)

}  // namespace hmi::cuda
