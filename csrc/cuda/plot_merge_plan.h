// How plot_merge lays a batch over threads. All its tuned numbers are here.
#pragma once

#include <cstdint>

namespace hmi::cuda {

// A chunk is 16 bytes of an output row; a lane holds vectors_per_lane of them.
struct MergeLayout {
  int32_t max_chunks;        // of the rows that it serves
  int32_t vectors_per_lane;  // 1 or 2
  int32_t tokens_at_once;    // by a block
};

constexpr MergeLayout kMergeLayouts[] = {
    {32, 1, 8},    // up to 256 16-bit columns: one warp a token
    {64, 2, 8},    // 512: likewise, no barrier in the layer norm
    {96, 1, 4},    // 768: three full warps
    {128, 2, 4},   // 1024
    {256, 2, 2},   // 2048
    {512, 2, 1},   // 4096
    {1024, 2, 1},  // 4096 columns of float32
};

// A block that takes more rounds reads the layer norm's weights more seldom, but fewer blocks fill the device.
struct MergeRounds {
  int64_t min_groups;  // of tokens_at_once tokens
  int32_t rounds;
};

constexpr MergeRounds kMergeRounds[] = {{2048, 8}, {1024, 4}, {512, 2}, {0, 1}};

constexpr int kMaxMergeTokens = 64;  // of a block: tokens_at_once * rounds at most

struct MergePlan {
  int32_t vectors_per_lane;
  int32_t warps_per_token;
  int32_t tokens_at_once;
  int32_t rounds;
};

// All zero if a row has more chunks than any layout serves.
constexpr MergePlan plan_merge(int64_t num_tokens, int64_t num_chunks) {
  for (const MergeLayout& layout : kMergeLayouts) {
    if (num_chunks > layout.max_chunks) continue;
    const int64_t groups = (num_tokens + layout.tokens_at_once - 1) / layout.tokens_at_once;
    const int64_t chunks_per_warp = int64_t{32} * layout.vectors_per_lane;
    const int32_t warps = static_cast<int32_t>((num_chunks + chunks_per_warp - 1) / chunks_per_warp);
    for (const MergeRounds& entry : kMergeRounds) {
      if (groups >= entry.min_groups) return {layout.vectors_per_lane, warps, layout.tokens_at_once, entry.rounds};
    }
  }
  return {0, 0, 0, 0};
}

}  // namespace hmi::cuda
