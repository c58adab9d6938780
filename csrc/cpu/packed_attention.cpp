#include "cpu/packed_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/packed_sequences.h"
#include "common/parallel.h"
#include "cpu/simd/dispatch.h"

namespace hmi {
namespace {

using Arguments = PackedAttentionArguments;

// The scores of so many queries are held at a time.
constexpr int64_t kQueryBlock = 64;
// Keys transposed together: one cache line of each column is written at once.
constexpr int64_t kTransposeBlock = 16;
constexpr int64_t kMultiplyAddsWorthAThread = 250'000;

void check(const Arguments& a) {
  check_offsets("query_offsets", a.query_offsets, a.num_sequences, a.num_queries);
  check_offsets("key_offsets", a.key_offsets, a.num_sequences, a.num_keys);
  for (int64_t s = 0; s < a.num_sequences; ++s) {
    if (a.query_offsets[s] < a.query_offsets[s + 1] && a.key_offsets[s] == a.key_offsets[s + 1]) {
      throw std::invalid_argument("sequence " + std::to_string(s) + " has queries but no keys to attend to");
    }
  }
}

// Dense copies of one head's keys, transposed to [head_size, num_keys], and values [num_keys, head_size]: the order in
// which the matrix products read their weights.
struct HeadScratch {
  float* keys;
  float* values;
  float* scores;
};

void copy_head(const Arguments& a, int64_t first_key, int64_t num_keys, int64_t column, const HeadScratch& scratch) {
  for (int64_t block = 0; block < num_keys; block += kTransposeBlock) {
    const int64_t end = std::min(block + kTransposeBlock, num_keys);
    for (int64_t d = 0; d < a.head_size; ++d) {
      const float* from = a.keys + (first_key + block) * a.key_stride + column + d;
      for (int64_t key = block; key < end; ++key, from += a.key_stride) scratch.keys[d * num_keys + key] = *from;
    }
  }
  for (int64_t key = 0; key < num_keys; ++key) {
    const float* from = a.values + (first_key + key) * a.value_stride + column;
    std::memcpy(scratch.values + key * a.head_size, from, a.head_size * sizeof(float));
  }
}

void attend(const Arguments& a, const SimdKernels& kernels, int64_t sequence, int64_t head,
            const HeadScratch& scratch) noexcept {
  const int64_t first_key = a.key_offsets[sequence];
  const int64_t num_keys = a.key_offsets[sequence + 1] - first_key;
  const int64_t last_query = a.query_offsets[sequence + 1];
  if (a.query_offsets[sequence] == last_query) return;
  const int64_t column = head * a.head_size;
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.head_size));
  copy_head(a, first_key, num_keys, column, scratch);
  for (int64_t query = a.query_offsets[sequence]; query < last_query; query += kQueryBlock) {
    const int64_t rows = std::min(kQueryBlock, last_query - query);
    kernels.matmul_activate({a.queries + query * a.query_stride + column, a.query_stride, scratch.keys, num_keys,
                             nullptr, scratch.scores, num_keys, rows, a.head_size, num_keys},
                            kIdentity);
    kernels.softmax_rows(scratch.scores, rows, num_keys, scale);
    kernels.matmul_activate({scratch.scores, num_keys, scratch.values, a.head_size, nullptr,
                             a.outputs + query * a.output_stride + column, a.output_stride, rows, num_keys,
                             a.head_size},
                            kIdentity);
  }
}

}  // namespace

void packed_attention(const Arguments& arguments, int num_threads) {
  const Arguments& a = arguments;
  check(a);
  int64_t most_keys = 0;
  int64_t multiply_adds = 0;
  for (int64_t s = 0; s < a.num_sequences; ++s) {
    const int64_t num_keys = a.key_offsets[s + 1] - a.key_offsets[s];
    most_keys = std::max(most_keys, num_keys);
    multiply_adds += 2 * num_keys * (a.query_offsets[s + 1] - a.query_offsets[s]) * a.num_heads * a.head_size;
  }
  const int threads = threads_for(num_threads, multiply_adds, kMultiplyAddsWorthAThread);
  const int64_t head_elements = most_keys * a.head_size;
  const int64_t scratch_size = 2 * head_elements + kQueryBlock * most_keys;
  std::vector<float> scratch(scratch_size * threads);
  const SimdKernels& kernels = active_kernels();
  parallel_for(threads, a.num_sequences * a.num_heads, [&](int64_t task, int worker) noexcept {
    float* own = scratch.data() + worker * scratch_size;
    attend(a, kernels, task / a.num_heads, task % a.num_heads, {own, own + head_elements, own + 2 * head_elements});
  });
}

}  // namespace hmi
