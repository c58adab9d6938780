#include "cpu/grouped_vector.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "common/segments.h"

namespace hmi {
namespace {

using Arguments = GroupedVectorArguments;

constexpr int64_t kElementsPerTask = 16 * 1024;
// Below this many elements (some microseconds of work) waking others costs more than it brings.
constexpr int64_t kElementsWorthAThread = 64 * 1024;

struct Task {
  const float* vector;
  int64_t row;
  int64_t num_rows;
};

void check(const Arguments& a) {
  check_segments({a.segment_offsets, a.segment_slots, a.num_segments, a.num_tokens, a.num_slots});
  for (int64_t g = 0; g < a.num_segments; ++g) {
    const int32_t slot = a.segment_slots[g];
    if (slot < 0 || a.slot_offsets[slot] == -1) continue;
    const int64_t offset = a.slot_offsets[slot];
    if (offset < 0 || offset > a.arena_size - a.hidden_size) {
      throw std::invalid_argument("slot_offsets[" + std::to_string(slot) + "] is " + std::to_string(offset) +
                                  ", but its vector of " + std::to_string(a.hidden_size) +
                                  " elements does not fit into the arena of " + std::to_string(a.arena_size));
    }
  }
}

std::vector<Task> split_into_tasks(const Arguments& a) {
  const int64_t step = std::max<int64_t>(kElementsPerTask / std::max<int64_t>(a.hidden_size, 1), 1);
  std::vector<Task> tasks;
  for (int64_t g = 0; g < a.num_segments; ++g) {
    const int32_t slot = a.segment_slots[g];
    if (slot < 0 || a.slot_offsets[slot] == -1) continue;
    for (int64_t row = a.segment_offsets[g]; row < a.segment_offsets[g + 1]; row += step) {
      tasks.push_back({a.arena + a.slot_offsets[slot], row, std::min(step, a.segment_offsets[g + 1] - row)});
    }
  }
  return tasks;
}

void scale_row(float* __restrict row, const float* __restrict vector, int64_t size) noexcept {
  for (int64_t i = 0; i < size; ++i) row[i] *= vector[i];
}

void add_row(float* __restrict row, const float* __restrict vector, int64_t size) noexcept {
  for (int64_t i = 0; i < size; ++i) row[i] += vector[i];
}

}  // namespace

void grouped_vector(const Arguments& arguments, int num_threads) {
  check(arguments);
  const std::vector<Task> tasks = split_into_tasks(arguments);
  const auto apply = arguments.operation == VectorOperation::kScale ? scale_row : add_row;
  const int threads = threads_for(num_threads, arguments.num_tokens * arguments.hidden_size, kElementsWorthAThread);
  parallel_for(threads, static_cast<int64_t>(tasks.size()), [&](int64_t number, int) noexcept {
    const Task& task = tasks[number];
    for (int64_t row = task.row; row < task.row + task.num_rows; ++row) {
      apply(arguments.hidden_states + row * arguments.stride, task.vector, arguments.hidden_size);
    }
  });
}

}  // namespace hmi
