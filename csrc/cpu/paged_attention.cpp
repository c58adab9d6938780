#include "cpu/paged_attention.h"

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

using Arguments = PagedAttentionArguments;

// The scores of so many queries are held at a time.
constexpr int64_t kQueryBlock = 32;
constexpr int64_t kMultiplyAddsWorthAThread = 100'000;

void check(const Arguments& a) {
  check_offsets("query_offsets", a.query_offsets, a.num_sequences, a.num_queries);
  for (int64_t s = 0; s < a.num_sequences; ++s) {
    const std::string sequence = "sequence " + std::to_string(s);
    const int64_t num_new = a.query_offsets[s + 1] - a.query_offsets[s];
    const int64_t length = a.context_lengths[s];
    if (length < num_new || length > a.table_width * a.block_size) {
      throw std::invalid_argument(sequence + " has " + std::to_string(length) + " tokens, but brings " +
                                  std::to_string(num_new) + " new ones and has room for " +
                                  std::to_string(a.table_width * a.block_size));
    }
    for (int64_t i = 0; i * a.block_size < length; ++i) {
      const int32_t block = a.block_tables[s * a.table_width + i];
      if (block < 0 || block >= a.num_blocks) {
        throw std::invalid_argument(sequence + " names block " + std::to_string(block) + ", but the cache has " +
                                    std::to_string(a.num_blocks));
      }
    }
  }
}

int64_t padded(int64_t tokens, int64_t block_size) { return (tokens + block_size - 1) / block_size * block_size; }

// One head of one sequence.
class HeadAttention {
 public:
  HeadAttention(const Arguments& arguments, const SimdKernels& kernels, int64_t sequence, int64_t head, float* scores)
      : a_(arguments),
        kernels_(kernels),
        blocks_(a_.block_tables + sequence * a_.table_width),
        head_(head),
        column_(head * a_.head_size),
        begin_(a_.query_offsets[sequence]),
        end_(a_.query_offsets[sequence + 1]),
        first_token_(a_.context_lengths[sequence] - (end_ - begin_)),
        scores_(scores) {}

  void run() const noexcept {
    append();
    for (int64_t query = begin_; query < end_; query += kQueryBlock) attend(query, std::min(end_, query + kQueryBlock));
  }

 private:
  int64_t head_elements() const { return a_.head_size * a_.block_size; }
  float* key_block(int64_t i) const { return a_.key_cache + (blocks_[i] * a_.num_heads + head_) * head_elements(); }
  float* value_block(int64_t i) const { return a_.value_cache + (blocks_[i] * a_.num_heads + head_) * head_elements(); }

  void append() const noexcept {
    for (int64_t query = begin_; query < end_; ++query) {
      const int64_t token = first_token_ + query - begin_;
      const int64_t place = token % a_.block_size;
      float* keys = key_block(token / a_.block_size) + place;
      const float* key = a_.keys + query * a_.key_stride + column_;
      for (int64_t d = 0; d < a_.head_size; ++d) keys[d * a_.block_size] = key[d];
      std::memcpy(value_block(token / a_.block_size) + place * a_.head_size,
                  a_.values + query * a_.value_stride + column_, a_.head_size * sizeof(float));
    }
  }

  // Queries begin .. end of all; each sees the tokens up to its own.
  void attend(int64_t begin, int64_t end) const noexcept {
    const int64_t rows = end - begin;
    const int64_t first_visible = first_token_ + begin - begin_ + 1;
    const int64_t most_visible = first_visible + rows - 1;
    const float scale = 1.0f / std::sqrt(static_cast<float>(a_.head_size));
    const int64_t stride = padded(most_visible, a_.block_size);
    // Whole blocks, whatever lies behind the last token: how a product is summed up depends on its columns, and so would
    // depend on what comes later.
    for (int64_t at = 0; at < most_visible; at += a_.block_size) {
      kernels_.matmul_activate({a_.queries + begin * a_.query_stride + column_, a_.query_stride,
                                key_block(at / a_.block_size), a_.block_size, nullptr, scores_ + at, stride, rows,
                                a_.head_size, a_.block_size},
                               kIdentity);
    }
    for (int64_t row = 0; row < rows; ++row) {
      float* scores = scores_ + row * stride;
      kernels_.softmax_rows(scores, 1, first_visible + row, scale);
      std::fill(scores + first_visible + row, scores + most_visible, 0.0f);
    }
    float* outputs = a_.outputs + begin * a_.output_stride + column_;
    for (int64_t at = 0; at < most_visible; at += a_.block_size) {
      const MatmulArguments product = {scores_ + at, stride, value_block(at / a_.block_size), a_.head_size,
                                       nullptr, outputs, a_.output_stride, rows,
                                       std::min(a_.block_size, most_visible - at), a_.head_size};
      at == 0 ? kernels_.matmul_activate(product, kIdentity) : kernels_.matmul_accumulate(product, 1.0f);
    }
  }

  const Arguments& a_;
  const SimdKernels& kernels_;
  const int32_t* blocks_;
  int64_t head_;
  int64_t column_;
  int64_t begin_;
  int64_t end_;
  int64_t first_token_;  // of the new ones, in the sequence
  float* scores_;
};

}  // namespace

void paged_attention(const Arguments& arguments, int num_threads) {
  const Arguments& a = arguments;
  check(a);
  int64_t most_tokens = 0;
  int64_t multiply_adds = 0;
  for (int64_t s = 0; s < a.num_sequences; ++s) {
    most_tokens = std::max(most_tokens, padded(a.context_lengths[s], a.block_size));
    multiply_adds +=
        2 * a.context_lengths[s] * (a.query_offsets[s + 1] - a.query_offsets[s]) * a.num_heads * a.head_size;
  }
  const int threads = threads_for(num_threads, multiply_adds, kMultiplyAddsWorthAThread);
  std::vector<float> scores(kQueryBlock * most_tokens * threads);
  const SimdKernels& kernels = active_kernels();
  parallel_for(threads, a.num_sequences * a.num_heads, [&](int64_t task, int worker) noexcept {
    HeadAttention(a, kernels, task / a.num_heads, task % a.num_heads, scores.data() + worker * kQueryBlock * most_tokens)
        .run();
  });
}

}  // namespace hmi
