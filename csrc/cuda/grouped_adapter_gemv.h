// Adapters over segments of one or a few tokens: no tensor cores, each weight read once per group of tokens.
#pragma once

#include "cuda/adapter_plan.h"
#include "cuda/grouped_adapter.h"

namespace hmi::cuda {

constexpr int kGemvThreads = 256;
constexpr int kGemvUnit = 8;  // 16-bit elements in 16 bytes: what a thread reads of a matrix at a time
// A token's inner state in shared memory: column c lies at (c % 8) * pitch + c / 8. Warps write it with c / 8 running
// over the lanes and read it with c running, both without bank conflicts.
constexpr int kInnerPitch = kMaxRank / kGemvUnit + 4;

// Shared memory of a block that works on group_tokens tokens and keeps row_elements 16-bit elements of each: partial
// sums of every thread, inner states, rows.
constexpr int64_t gemv_shared_bytes(int group_tokens, int64_t row_elements) {
  return group_tokens * (kGemvUnit * (kGemvThreads + kInnerPitch) * int64_t{sizeof(float)} + row_elements * 2);
}

cudaError_t launch_adapter_gemv(const GroupedAdapterArguments& arguments, const AdapterPlan& plan,
                                cudaStream_t stream);

}  // namespace hmi::cuda
