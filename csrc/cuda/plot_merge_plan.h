// How plot_merge lays a batch over threads. All its tuned numbers are here.
#pragma once

#include <cstdint>

namespace hmi::cuda {

constexpr int kMaxMergeHiddenSize = 4096;

// A chunk is 16 bytes of an output row; a lane holds vectors_per_lane of them.
struct MergeLayout {
  int32_t max_chunks;        // of the rows that it serves
  int32_t vectors_per_lane;  // 1 or 2
  int32_t tokens_at_once;    // by a block

  constexpr int32_t warps_per_token(int64_t num_chunks) const {
    const int64_t chunks_per_warp = int64_t{32} * vectors_per_lane;
    return static_cast<int32_t>((num_chunks + chunks_per_warp - 1) / chunks_per_warp);
  }
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

constexpr int kMaxMergeTokens = 64;  // of a block

constexpr int most_tokens_of_a_block() {
  int most = 0;
  for (const MergeLayout& layout : kMergeLayouts) {
    for (const MergeRounds& entry : kMergeRounds) {
      if (layout.tokens_at_once * entry.rounds > most) most = layout.tokens_at_once * entry.rounds;
    }
  }
  return most;
}
static_assert(most_tokens_of_a_block() == kMaxMergeTokens);

struct MergePlan {
  int32_t vectors_per_lane;
  int32_t warps_per_token;
  int32_t tokens_at_once;
  int32_t rounds;
};

// Threads of the largest block with so many vectors a lane, for rows of elements of that size.
constexpr int max_merge_threads(int vectors_per_lane, int element_size) {
  const int most_chunks = kMaxMergeHiddenSize * element_size / 16;
  int most = 0, served = 0;
  for (const MergeLayout& layout : kMergeLayouts) {
    if (served >= most_chunks) break;
    served = layout.max_chunks < most_chunks ? layout.max_chunks : most_chunks;
    const int threads = layout.tokens_at_once * layout.warps_per_token(served) * 32;
    if (layout.vectors_per_lane == vectors_per_lane && threads > most) most = threads;
  }
  return most;
}

// Blocks that a multiprocessor shall hold: a bound on the registers of a thread.
constexpr int min_merge_blocks(int vectors_per_lane) { return vectors_per_lane == 1 ? 2 : 1; }

// For rows of at most kMaxMergeHiddenSize elements.
constexpr MergePlan plan_merge(int64_t num_tokens, int64_t num_chunks) {
  for (const MergeLayout& layout : kMergeLayouts) {
    if (num_chunks > layout.max_chunks) continue;
    const int64_t groups = (num_tokens + layout.tokens_at_once - 1) / layout.tokens_at_once;
    const int32_t warps = layout.warps_per_token(num_chunks);
    for (const MergeRounds& entry : kMergeRounds) {
      if (groups >= entry.min_groups) return {layout.vectors_per_lane, warps, layout.tokens_at_once, entry.rounds};
    }
  }
  return {0, 0, 0, 0};
}

}  // namespace hmi::cuda
