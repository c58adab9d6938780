#include "cpu/grouped_adapter.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "common/segments.h"
#include "cpu/simd/dispatch.h"

namespace hmi {
namespace {

using Arguments = GroupedAdapterArguments;

// A task's rows between the two products stay in the first-level cache.
constexpr int64_t kScratchElements = 4096;
constexpr int64_t kMaxRowsPerTask = 64;
// Below this many multiply-adds (some microseconds of work) waking others costs more than it brings.
constexpr int64_t kMultiplyAddsWorthAThread = 250'000;

struct Task {
  const Arguments* projection;
  int32_t slot;
  int64_t row;
  int64_t num_rows;
};

void check(const Arguments& a) {
  const Segments segments{a.segment_offsets, a.segment_slots, a.num_segments, a.num_tokens, a.num_slots};
  check_segments(segments);
  const bool has_biases = a.slot_activations != nullptr;
  check_slots(segments, {a.slot_offsets, a.slot_ranks, a.slot_activations, a.arena_size,
                         a.input_size + a.output_size + has_biases, has_biases ? a.output_size : 0, 1, a.arena_size});
}

void split_into_tasks(const Arguments& a, std::vector<Task>& tasks) {
  for (int64_t g = 0; g < a.num_segments; ++g) {
    const int32_t slot = a.segment_slots[g];
    if (slot < 0 || a.slot_ranks[slot] == 0) continue;
    const int64_t step = std::clamp<int64_t>(kScratchElements / a.slot_ranks[slot], 1, kMaxRowsPerTask);
    for (int64_t row = a.segment_offsets[g]; row < a.segment_offsets[g + 1]; row += step) {
      tasks.push_back({&a, slot, row, std::min(step, a.segment_offsets[g + 1] - row)});
    }
  }
}

void run_task(const SimdKernels& kernels, const Task& task, float* scratch) noexcept {
  const Arguments& a = *task.projection;
  const bool is_bottleneck = a.slot_activations != nullptr;
  const int64_t rank = a.slot_ranks[task.slot];
  const float* down = a.arena + a.slot_offsets[task.slot];
  const float* down_bias = down + a.input_size * rank;
  const float* up = down_bias + (is_bottleneck ? rank : 0);
  const float* up_bias = up + rank * a.output_size;
  const Activation activation = is_bottleneck ? static_cast<Activation>(a.slot_activations[task.slot]) : kIdentity;
  kernels.matmul_activate({a.inputs + task.row * a.input_stride, a.input_stride, down, rank,
                           is_bottleneck ? down_bias : nullptr, scratch, rank, task.num_rows, a.input_size, rank},
                          activation);
  kernels.matmul_accumulate({scratch, rank, up, a.output_size, is_bottleneck ? up_bias : nullptr,
                             a.outputs + task.row * a.output_stride, a.output_stride, task.num_rows, rank,
                             a.output_size},
                            a.slot_scales[task.slot]);
}

}  // namespace

void grouped_adapter(const std::vector<Arguments>& projections, int num_threads) {
  for (const Arguments& projection : projections) check(projection);
  std::vector<Task> tasks;
  for (const Arguments& projection : projections) split_into_tasks(projection, tasks);
  int64_t scratch_size = 0;
  int64_t multiply_adds = 0;
  for (const Task& task : tasks) {
    const int64_t elements = task.num_rows * task.projection->slot_ranks[task.slot];
    scratch_size = std::max(scratch_size, elements);
    multiply_adds += elements * (task.projection->input_size + task.projection->output_size);
  }
  const int threads = threads_for(num_threads, multiply_adds, kMultiplyAddsWorthAThread);
  std::vector<float> scratch(scratch_size * threads);
  const SimdKernels& kernels = active_kernels();
  parallel_for(threads, static_cast<int64_t>(tasks.size()), [&](int64_t task, int worker) noexcept {
    run_task(kernels, tasks[task], scratch.data() + worker * scratch_size);
  });
}

}  // namespace hmi
