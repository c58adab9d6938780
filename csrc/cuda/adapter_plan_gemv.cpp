// The table of the GEMV path. Derived from what A100 and H100 publish (108 and 132 multiprocessors, 64 KiB of loads
// under way per multiprocessor at two blocks, some 2 us for a launch), not measured.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cuda/adapter_plan.h"
#include "cuda/grouped_adapter_gemv.h"

namespace hmi::cuda {
namespace {

// From how many blocks (segments x projections) on one launch does both products, by the bytes of a block's weights:
// small weights are read in less time than a second launch takes; large ones want the whole machine.
struct FusedRow {
  int64_t max_bytes;
  int64_t min_blocks;
};
constexpr FusedRow kFused[] = {
    {48 * 1024, 1},
    {256 * 1024, 32},
    {std::numeric_limits<int64_t>::max(), 64},
};

// Two blocks for each multiprocessor: as many as splits and column chunks aim at.
constexpr int64_t kTargetBlocks = 256;
// Each column chunk reads the partial sums of each split again: 4 splits * chunks bytes for each token and rank, which
// has 2 (input_size + output_size) bytes of weights. With their product at most that sum over this, and over the
// tokens, it is an additional 1/16.
constexpr int64_t kSizePerSplitAndChunk = 32;
constexpr int64_t kMinSplitDepth = 64;
constexpr int64_t kMinChunkColumns = 64;

// Inputs (or rows before a layer norm) of a group in shared memory: two blocks fit on a multiprocessor of sm_80.
constexpr int64_t kMaxRowElements = 16 * 1024;
constexpr int64_t kMaxSharedBytes = 81 * 1024;  // half of 163 KiB, less 1 KiB that the system takes per block
static_assert(gemv_shared_bytes(1, kMaxRowElements) <= kMaxSharedBytes);
static_assert(gemv_shared_bytes(2, kMaxRowElements / 2) <= kMaxSharedBytes);
static_assert(gemv_shared_bytes(4, kMaxRowElements / 4) <= kMaxSharedBytes);

int64_t at_least_one(int64_t number) { return std::max<int64_t>(number, 1); }

int64_t tokens_per_segment(const AdapterShape& shape) {
  return at_least_one((shape.num_tokens + shape.num_segments - 1) / at_least_one(shape.num_segments));
}

int32_t group_tokens(const AdapterShape& shape) {
  const int64_t tokens = tokens_per_segment(shape);
  int32_t group = tokens == 1 ? 1 : tokens == 2 ? 2 : 4;
  while (group > 1 && group * int64_t{shape.input_size} > kMaxRowElements) group /= 2;
  return group;
}

bool is_fused(const AdapterShape& shape, int64_t blocks, int64_t output_size) {
  const int64_t bytes = 2 * int64_t{shape.max_rank} * (shape.input_size + output_size);
  const FusedRow* row = kFused;
  while (bytes > row->max_bytes) ++row;
  return blocks >= row->min_blocks;
}

}  // namespace

AdapterPlan plan_gemv(const AdapterShape& shape) {
  const int64_t blocks = at_least_one(shape.num_segments * shape.num_projections);
  const int64_t output_size = shape.total_output_size / shape.num_projections;
  AdapterPlan plan{};
  plan.kernel = AdapterKernel::kGemv;
  plan.group_tokens = group_tokens(shape);
  plan.shared_bytes = gemv_shared_bytes(plan.group_tokens, shape.input_size);
  plan.launches = plan.splits = plan.column_chunks = 1;
  if (is_fused(shape, blocks, output_size)) return plan;

  const int64_t wanted = (kTargetBlocks + blocks - 1) / blocks;
  const int64_t product = (shape.input_size + output_size) / (kSizePerSplitAndChunk * tokens_per_segment(shape));
  const auto even_share = static_cast<int64_t>(std::sqrt(product));
  const int64_t splits = at_least_one(std::min({wanted, even_share, shape.input_size / kMinSplitDepth}));
  const int64_t chunks = at_least_one(std::min({wanted, product / splits, output_size / kMinChunkColumns}));
  plan.launches = 2;
  plan.splits = static_cast<int32_t>(splits);
  plan.column_chunks = shape.has_layer_norm ? 1 : static_cast<int32_t>(chunks);
  plan.workspace_elements = shape.num_projections * shape.num_tokens * splits * int64_t{shape.max_rank};
  return plan;
}

}  // namespace hmi::cuda
