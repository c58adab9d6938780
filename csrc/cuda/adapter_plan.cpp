// The table of the tile kernel and the choice between the two adapter kernels. Derived from what A100 publishes
// (164 KiB of shared memory and 65,536 registers for each of 108 multiprocessors), not measured.
#include "cuda/adapter_plan.h"

#include <algorithm>
#include <iterator>
#include <limits>

#include "cuda/adapter_tile_shape.h"

namespace hmi::cuda {
namespace {

constexpr int64_t kAnyNumber = std::numeric_limits<int64_t>::max();
constexpr int32_t kNoLayerNorm = 0;

// Longer tiles read weights less often, shorter ones make more blocks. A tile has no more rows than a segment has
// tokens, and no more than leave each multiprocessor a tile.
constexpr int64_t kMultiprocessors = 108;
constexpr int kMultiprocessorSharedBytes = 164 * 1024;

struct TileRow {
  int32_t max_layer_norm_size;
  int64_t max_tokens;  // of a tile: see above
  TileShape shape;     // rows, rank class, chunk
  int32_t num_stages;
  int32_t blocks;  // on one multiprocessor of sm_80
};

// The first row that fits the shape and the device is taken. Layer norms keep whole rows in shared memory: 32 of them
// up to 1,024 columns.
constexpr TileRow kTiles[] = {
    {4096, kAnyNumber, {16, 32, 64}, 3, 1},
    {4096, kAnyNumber, {16, 64, 64}, 2, 1},

    {kNoLayerNorm, 16, {16, 128, 64}, 2, 3},
    {kNoLayerNorm, 32, {32, 128, 64}, 2, 3},
    {kNoLayerNorm, kAnyNumber, {64, 128, 64}, 2, 2},
    {1024, 16, {16, 128, 64}, 2, 2},
    {1024, kAnyNumber, {32, 128, 64}, 2, 1},
    {3072, kAnyNumber, {16, 128, 64}, 2, 1},

    {kNoLayerNorm, 16, {16, 256, 64}, 2, 2},
    {kNoLayerNorm, 32, {32, 256, 64}, 2, 1},
    {kNoLayerNorm, kAnyNumber, {64, 256, 64}, 2, 1},
    {kNoLayerNorm, kAnyNumber, {16, 256, 64}, 2, 2},  // where a block has less shared memory
    {1024, 16, {16, 256, 64}, 2, 1},
    {1024, kAnyNumber, {32, 256, 64}, 2, 1},
    {2560, kAnyNumber, {16, 256, 64}, 2, 1},
    {4096, kAnyNumber, {16, 256, 16}, 3, 1},
};

// Beside the dynamic shared memory a block has TileWork, and the device takes 1 KiB of each.
constexpr int kStaticSharedBytes = 512;
constexpr int kReservedSharedBytes = 1024;
constexpr bool fits(const TileRow& row) {
  const int bytes = tile_memory(row.shape, row.num_stages, row.max_layer_norm_size).total + kStaticSharedBytes;
  return bytes <= kMaxSharedBytes && row.blocks * (bytes + kReservedSharedBytes) <= kMultiprocessorSharedBytes;
}
constexpr bool all_fit() {
  for (const TileRow& row : kTiles) {
    if (!fits(row)) return false;
  }
  return true;
}
static_assert(all_fit());

// The kernel of slices, as measured on an H200: it is faster than tiles for all of these ranks, and blocks of 32 rows were
// no faster than those of 16, whose weights come from the second-level cache. A longer ring is worth having as long as
// the blocks that fit beside each other need no more rounds for it.
struct SliceRow {
  int32_t rank_class;
  int32_t num_stages;
};
constexpr SliceRow kSlices[] = {{16, 3}, {16, 2}, {32, 2}, {64, 2}};
constexpr int64_t kMultiprocessorsOfHopper = 132;
constexpr int kMultiprocessorSharedBytesOfHopper = 228 * 1024;
constexpr int64_t kMaxSliceBlocks = 4;  // on a multiprocessor: what its registers hold

int64_t slice_blocks_beside_each_other(int32_t shared_bytes) {
  const int bytes = shared_bytes + kStaticSharedBytes + kReservedSharedBytes;
  return std::min<int64_t>(kMaxSliceBlocks, kMultiprocessorSharedBytesOfHopper / bytes);
}

const TileRow* find_row(int32_t columns, int32_t layer_norm_size, int64_t tokens, int32_t max_shared_bytes) {
  return std::find_if(std::begin(kTiles), std::end(kTiles), [&](const TileRow& row) {
    const int bytes = tile_memory(row.shape, row.num_stages, layer_norm_size).total + kStaticSharedBytes;
    return bytes <= max_shared_bytes && columns <= row.shape.rank_class && tokens <= row.max_tokens &&
           (layer_norm_size > 0) == (row.max_layer_norm_size > 0) && layer_norm_size <= row.max_layer_norm_size;
  });
}

int64_t ceil_quotient(int64_t numerator, int64_t denominator) { return (numerator + denominator - 1) / denominator; }

int64_t tokens_per_segment(const AdapterShape& shape) {
  return ceil_quotient(shape.num_tokens, std::max<int64_t>(shape.num_segments, 1));
}

}  // namespace

AdapterPlan plan_tiles(const AdapterShape& shape) {
  const bool fits_together = inner_columns(shape.max_rank, shape.num_projections) <= kMaxRank;
  const int32_t columns = inner_columns(shape.max_rank, fits_together ? shape.num_projections : 1);
  const int32_t layer_norm_size = shape.has_layer_norm ? shape.total_output_size : kNoLayerNorm;
  const int64_t tokens = std::min(tokens_per_segment(shape), ceil_quotient(shape.num_tokens, kMultiprocessors));
  const TileRow* found = find_row(columns, layer_norm_size, tokens, shape.max_shared_bytes);
  AdapterPlan plan{};
  plan.kernel = AdapterKernel::kTiles;
  if (found == std::end(kTiles)) return plan;
  const TileRow& row = *found;
  plan.tile_rows = row.shape.rows;
  plan.num_stages = row.num_stages;
  plan.chunk = row.shape.chunk;
  plan.rank_class = row.shape.rank_class;
  plan.shared_bytes = tile_memory(row.shape, row.num_stages, layer_norm_size).total;
  plan.launches = fits_together ? 1 : shape.num_projections;
  plan.blocks_per_multiprocessor = row.blocks;
  return plan;
}

AdapterPlan plan_slices(const AdapterShape& shape) {
  AdapterPlan plan{};
  plan.kernel = AdapterKernel::kSlices;
  const int32_t columns = inner_columns(shape.max_rank, shape.num_projections);
  const int32_t layer_norm_size = shape.has_layer_norm ? shape.total_output_size : kNoLayerNorm;
  const int64_t blocks = std::max(ceil_quotient(shape.num_tokens, kTensorTile), shape.num_segments);
  int64_t fewest_rounds = kAnyNumber;
  for (const SliceRow& row : kSlices) {
    const int bytes = slice_memory(row.rank_class, row.num_stages, layer_norm_size).total;
    if (columns > row.rank_class || bytes + kStaticSharedBytes > shape.max_shared_bytes) continue;
    if (plan.tile_rows > 0 && row.rank_class > plan.rank_class) break;
    const int64_t at_once = kMultiprocessorsOfHopper * slice_blocks_beside_each_other(bytes);
    const int64_t rounds = ceil_quotient(blocks, at_once);
    if (rounds >= fewest_rounds) continue;
    fewest_rounds = rounds;
    plan.tile_rows = kTensorTile;
    plan.num_stages = row.num_stages;
    plan.chunk = kSliceColumns;
    plan.rank_class = row.rank_class;
    plan.shared_bytes = bytes;
  }
  if (plan.tile_rows == 0) return plan;
  plan.launches = 1;
  const int64_t bytes = plan.shared_bytes + kStaticSharedBytes + kReservedSharedBytes;
  plan.blocks_per_multiprocessor = static_cast<int32_t>(
      std::min(kMaxSliceBlocks, kMultiprocessorSharedBytes / bytes));
  return plan;
}

AdapterPlan plan_adapter(const AdapterShape& shape) {
  if (tokens_per_segment(shape) <= kMaxGemvTokens) return plan_gemv(shape);
  const AdapterPlan slices = plan_slices(shape);
  return slices.tile_rows > 0 ? slices : plan_tiles(shape);
}

}  // namespace hmi::cuda
