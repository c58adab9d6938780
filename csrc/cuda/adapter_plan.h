// Which kernel a grouped adapter call takes and with which tiles: every tuned number of the adapter kernels is in
// adapter_plan.cpp's tables, keyed by shape.
#pragma once

#include <cstdint>

namespace hmi::cuda {

constexpr int kMinHiddenSize = 256;
constexpr int kMaxHiddenSize = 4096;  // outputs of one projection may be wider: up to 4 times this
constexpr int kMinRank = 8;
constexpr int kMaxRank = 256;
constexpr int kSizeMultiple = 8;  // 16 bytes of 16-bit elements

// What is known before a launch without reading device memory.
struct AdapterShape {
  int64_t num_tokens;
  int64_t num_segments;
  int32_t input_size;
  int32_t total_output_size;
  int32_t num_projections;
  int32_t max_rank;
  bool has_layer_norm;
  int32_t max_shared_bytes;  // that a block may have on the device
};

enum class AdapterKernel : int32_t { kTiles, kGemv, kSlices };

struct AdapterPlan {
  AdapterKernel kernel;
  // kTiles and kSlices: tensor cores, one block for tile_rows tokens of a segment.
  int32_t tile_rows;    // 16, 32 or 64
  int32_t num_stages;   // of the cp.async ring
  int32_t blocks_per_multiprocessor;  // on sm_80, as intended
  int32_t chunk;        // columns of a stage: 64, or 16 where 64 do not fit
  int32_t rank_class;   // 16, 32, 64, 128 or 256: the most inner columns (all projections together, each padded to 16)
  int64_t shared_bytes;
  int32_t launches;     // 1, or one a projection if the inner states of all do not fit together; kGemv: 1 or 2
  // kGemv: no tensor cores, for segments of a few tokens.
  int32_t group_tokens;   // 1, 2 or 4 tokens of a segment share a reading of its weights
  int32_t splits;         // of the first product's depth, in two launches; sums are added in a fixed order
  int32_t column_chunks;  // of the second product's columns, in two launches
  int64_t workspace_elements;  // float32
};

// Slices if the ranks are few and fit, else tiles; GEMV if a segment has kMaxGemvTokens tokens or fewer on average.
constexpr int64_t kMaxGemvTokens = 4;
AdapterPlan plan_adapter(const AdapterShape& shape);
AdapterPlan plan_tiles(const AdapterShape& shape);  // tile_rows 0: beyond these limits or the device's, no launch
AdapterPlan plan_slices(const AdapterShape& shape);  // tile_rows 0: beyond its limits
AdapterPlan plan_gemv(const AdapterShape& shape);  // adapter_plan_gemv.cpp

}  // namespace hmi::cuda
