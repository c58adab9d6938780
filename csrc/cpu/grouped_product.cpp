#include "cpu/grouped_product.h"

#include <algorithm>
#include <vector>

#include "common/parallel.h"
#include "cpu/simd/dispatch.h"

namespace hmi {
namespace {

constexpr int64_t kRowsPerTask = 64;
// Below this many multiply-adds (some microseconds of work) waking others costs more than it brings.
constexpr int64_t kMultiplyAddsWorthAThread = 250'000;

// The segments of each slot that has a matrix here, slots in the order of their first segment.
struct SlotSegments {
  int32_t slot;
  std::vector<int64_t> segments;
};

std::vector<SlotSegments> segments_by_slot(const Segments& s, const MatrixTable& table) {
  std::vector<SlotSegments> found;
  std::vector<int64_t> place_of_slot(s.num_slots, -1);
  for (int64_t g = 0; g < s.count; ++g) {
    const int32_t slot = s.slots[g];
    if (!table.has(slot) || s.offsets[g] == s.offsets[g + 1]) continue;
    if (place_of_slot[slot] < 0) {
      place_of_slot[slot] = static_cast<int64_t>(found.size());
      found.push_back({slot, {}});
    }
    found[place_of_slot[slot]].segments.push_back(g);
  }
  return found;
}

int64_t multiply_adds(const Segments& s, const MatrixTable& table) {
  int64_t sum = 0;
  for (int64_t g = 0; g < s.count; ++g) {
    const int32_t slot = s.slots[g];
    if (table.has(slot)) sum += (s.offsets[g + 1] - s.offsets[g]) * table.rows[slot] * table.columns[slot];
  }
  return sum;
}

// to[columns, rows] = from[rows, columns] transposed; strides are of rows.
void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
               int64_t to_stride) noexcept {
  constexpr int64_t kBlock = 16;  // of 64-byte lines on both sides
  for (int64_t first = 0; first < rows; first += kBlock) {
    const int64_t last = std::min(first + kBlock, rows);
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t row = first; row < last; ++row) to[column * to_stride + row] = from[row * from_stride + column];
    }
  }
}

// The matrices of the slots in use, transposed: the order in which products read their weights.
class TransposedMatrices {
 public:
  TransposedMatrices(const std::vector<SlotSegments>& used, const float* arena, const MatrixTable& table,
                     int64_t num_slots, int threads)
      : starts_(num_slots, 0) {
    int64_t size = 0;
    for (const SlotSegments& entry : used) {
      starts_[entry.slot] = size;
      size += int64_t{table.rows[entry.slot]} * table.columns[entry.slot];
    }
    elements_.resize(size);
    parallel_for(threads, static_cast<int64_t>(used.size()), [&](int64_t place, int) noexcept {
      const int32_t slot = used[place].slot;
      const int64_t rows = table.rows[slot], columns = table.columns[slot];
      transpose(arena + table.offsets[slot], columns, rows, columns, elements_.data() + starts_[slot], rows);
    });
  }

  const float* of(int32_t slot) const { return elements_.data() + starts_[slot]; }

 private:
  std::vector<int64_t> starts_;
  std::vector<float> elements_;
};

struct ProductTask {
  int32_t slot;
  int64_t row;
  int64_t num_rows;
};

std::vector<ProductTask> split_into_tasks(const Segments& s, const MatrixTable& table) {
  std::vector<ProductTask> tasks;
  for (int64_t g = 0; g < s.count; ++g) {
    if (!table.has(s.slots[g])) continue;
    for (int64_t row = s.offsets[g]; row < s.offsets[g + 1]; row += kRowsPerTask) {
      tasks.push_back({s.slots[g], row, std::min(kRowsPerTask, s.offsets[g + 1] - row)});
    }
  }
  return tasks;
}

// Gradients: the thinner operand of a slot's product of inputs^T and output gradients is transposed, in chunks of
// rows that fit the first-level cache, and multiplied with a panel of the wider one's columns.
constexpr int64_t kPanelColumns = 128;
constexpr int64_t kChunkElements = 4096;
constexpr int64_t kMinChunkRows = 16;
constexpr int64_t kMaxChunkRows = 256;

int64_t chunk_rows(int64_t thin) { return std::clamp(kChunkElements / thin, kMinChunkRows, kMaxChunkRows); }

struct GradientTask {
  const SlotSegments* entry;
  int64_t first_column;  // of the panel
};

struct GradientScratch {
  float* chunk;  // [thin, chunk_rows]
  float* panel;  // [thin, kPanelColumns]
};

void run_gradient_task(float* gradient, const Rows& inputs, const Rows& output_gradients, const Segments& segments,
                       const MatrixTable& table, const SimdKernels& kernels, const GradientTask& task,
                       const GradientScratch& scratch) noexcept {
  const int64_t rows = table.rows[task.entry->slot], columns = table.columns[task.entry->slot];
  const bool are_rows_wide = rows > columns;
  const Rows& thin = are_rows_wide ? output_gradients : inputs;
  const Rows& wide = are_rows_wide ? inputs : output_gradients;
  const int64_t thin_size = std::min(rows, columns);
  const int64_t panel_size = std::min(kPanelColumns, std::max(rows, columns) - task.first_column);
  float* block = gradient + table.offsets[task.entry->slot];

  std::fill_n(scratch.panel, thin_size * kPanelColumns, 0.0f);
  for (const int64_t g : task.entry->segments) {
    const int64_t step = chunk_rows(thin_size);
    for (int64_t row = segments.offsets[g]; row < segments.offsets[g + 1]; row += step) {
      const int64_t num_rows = std::min(step, segments.offsets[g + 1] - row);
      transpose(thin.start + row * thin.stride, thin.stride, num_rows, thin_size, scratch.chunk, step);
      kernels.matmul_accumulate({scratch.chunk, step, wide.start + row * wide.stride + task.first_column, wide.stride,
                                 nullptr, scratch.panel, kPanelColumns, thin_size, num_rows, panel_size},
                                1.0f);
    }
  }
  if (are_rows_wide) {
    transpose(scratch.panel, kPanelColumns, thin_size, panel_size, block + task.first_column * columns, columns);
    return;
  }
  for (int64_t row = 0; row < thin_size; ++row) {
    std::copy_n(scratch.panel + row * kPanelColumns, panel_size, block + row * columns + task.first_column);
  }
}

}  // namespace

void grouped_product(float* outputs, int64_t output_size, const Rows& inputs, const float* arena,
                     const Segments& segments, const MatrixTable& table, bool is_transposed, int num_threads) {
  check_segments(segments);
  check_matrices(segments, table, false);
  const int threads = threads_for(num_threads, multiply_adds(segments, table), kMultiplyAddsWorthAThread);
  const std::vector<SlotSegments> used =
      is_transposed ? segments_by_slot(segments, table) : std::vector<SlotSegments>{};
  const TransposedMatrices transposed(used, arena, table, segments.num_slots, threads);
  const std::vector<ProductTask> tasks = split_into_tasks(segments, table);
  const SimdKernels& kernels = active_kernels();
  parallel_for(threads, static_cast<int64_t>(tasks.size()), [&](int64_t number, int) noexcept {
    const ProductTask& task = tasks[number];
    const float* weights = is_transposed ? transposed.of(task.slot) : arena + table.offsets[task.slot];
    const int64_t depth = is_transposed ? table.columns[task.slot] : table.rows[task.slot];
    const int64_t width = is_transposed ? table.rows[task.slot] : table.columns[task.slot];
    kernels.matmul_activate({inputs.start + task.row * inputs.stride, inputs.stride, weights, width, nullptr,
                             outputs + task.row * output_size, output_size, task.num_rows, depth, width},
                            kIdentity);
  });
}

void grouped_weight_gradient(float* gradient, const Rows& inputs, const Rows& output_gradients,
                             const Segments& segments, const MatrixTable& table, int num_threads) {
  check_segments(segments);
  check_matrices(segments, table, true);
  const std::vector<SlotSegments> used = segments_by_slot(segments, table);
  std::vector<GradientTask> tasks;
  int64_t most_thin = 0, most_chunk_elements = 0;
  for (const SlotSegments& entry : used) {
    const int64_t rows = table.rows[entry.slot], columns = table.columns[entry.slot];
    const int64_t thin = std::min(rows, columns);
    most_thin = std::max(most_thin, thin);
    most_chunk_elements = std::max(most_chunk_elements, thin * chunk_rows(thin));
    for (int64_t column = 0; column < std::max(rows, columns); column += kPanelColumns) {
      tasks.push_back({&entry, column});
    }
  }
  const int threads = threads_for(num_threads, multiply_adds(segments, table), kMultiplyAddsWorthAThread);
  const int64_t scratch_size = most_chunk_elements + most_thin * kPanelColumns;
  std::vector<float> scratch(scratch_size * threads);
  const SimdKernels& kernels = active_kernels();
  parallel_for(threads, static_cast<int64_t>(tasks.size()), [&](int64_t number, int worker) noexcept {
    float* own = scratch.data() + worker * scratch_size;
    run_gradient_task(gradient, inputs, output_gradients, segments, table, kernels, tasks[number],
                      {own, own + most_chunk_elements});
  });
}

}  // namespace hmi
