// From a block's number to its tile of rows, without a table: segment g's tiles have the numbers from
// offsets[g] / tile_rows + g on. They rise with g and never meet, so grids of tokens / tile_rows + segments blocks hold
// them all (at most one block a segment finds nothing to do), and a block finds its segment by one search of offsets.
#pragma once

#include "cuda/fault.h"
#include "cuda/numeric.cuh"

namespace hmi::cuda {

struct SegmentTile {
  int64_t segment;  // -1: this block has nothing to do
  int64_t row;      // first token
  int rows;
  int32_t slot;  // of the segment, not yet checked, if slots were given
};

inline int64_t num_segment_tiles(int64_t num_tokens, int64_t num_segments, int64_t tile_rows) {
  return num_tokens / tile_rows + num_segments;
}

// Called by whole warps; every lane gets the tile. 32 lanes probe at once: two rounds for up to 1,024 segments. What
// else is known of a segment is read in the last round, for 32 at once, as one more trip to memory would take longer.
__device__ __forceinline__ SegmentTile find_segment_tile(const int64_t* segment_offsets, int64_t num_segments,
                                                         int64_t num_tokens, int64_t tile, int tile_rows,
                                                         unsigned long long* fault,
                                                         const int32_t* segment_slots = nullptr) {
  const int lane = threadIdx.x % kWarpSize;
  // The last segment whose first tile is not after ours lies in [low, high).
  int64_t low = 0, high = num_segments, step, begin, end;
  int slot;
  do {
    step = ceil_div(high - low, kWarpSize);
    const int64_t probe = low + lane * step;
    // Offsets out of bounds do not count, so that the segments beside theirs are found all the same.
    const int64_t offset = probe < high ? segment_offsets[probe] : -1;
    const bool is_last_round = step == 1 && probe < high;
    const int64_t next = is_last_round ? segment_offsets[probe + 1] : -1;
    const int slot_of_probe = is_last_round && segment_slots != nullptr ? segment_slots[probe] : -1;
    const bool starts_before = offset >= 0 && offset / tile_rows + probe <= tile;
    const unsigned votes = __ballot_sync(kFullWarp, starts_before) | 1u;  // whatever low's offset is, low remains
    const int last = kWarpSize - 1 - __clz(static_cast<int>(votes));
    low += last * step;
    high = high < low + step ? high : low + step;
    begin = __shfl_sync(kFullWarp, offset, last);
    end = __shfl_sync(kFullWarp, next, last);
    slot = __shfl_sync(kFullWarp, slot_of_probe, last);
  } while (step > 1);
  if (begin < 0 || end < begin || end > num_tokens) {
    report_fault(fault, fault_word(Fault::kSegmentOffsets, low));
    return {-1, 0, 0, -1};
  }
  const int64_t row = begin + (tile - begin / tile_rows - low) * tile_rows;
  if (row < begin || row >= end) return {-1, 0, 0, -1};
  return {low, row, static_cast<int>(end - row < tile_rows ? end - row : tile_rows), slot};
}

}  // namespace hmi::cuda
