// Which rows a token is summed of: the addresses that plot_merge loads from, found by one thread a token before any row
// is loaded. See csrc/cpu/plot_merge.h for the formulas.
#pragma once

#include "cpu/plot_lookup.h"
#include "cuda/plot_merge.h"
#include "cuda/plot_merge_plan.h"
#include "cuda/sequences.cuh"

namespace hmi::cuda {

// The places of a token's summands; some stay empty. Window 2 has no use for the last two.
enum Summand : int { kFromLeft, kFromRight, kUnigram, kPosition, kCenter, kCenterOfRight };

constexpr int num_summands(int window) { return window == 2 ? kCenter : kCenterOfRight + 1; }

__host__ __device__ constexpr int size_of(DataType type) {
  return type == DataType::kFloat32 ? 4 : type == DataType::kInt8 ? 1 : 2;
}

// The summand is scale * row.
struct SummandRow {
  const void* address = nullptr;  // null for none
  float scale = 1.0f;
  DataType type = DataType::kFloat32;
};

// Those of a block's tokens, in shared memory. One array for each field: neighboring threads write neighboring words.
template <int kSummands>
struct SummandRows {
  const void* addresses[kSummands][kMaxMergeTokens];
  float scales[kSummands][kMaxMergeTokens];
  DataType types[kSummands][kMaxMergeTokens];

  __device__ void set(int summand, int token, const SummandRow& row) {
    addresses[summand][token] = row.address;
    scales[summand][token] = row.scale;
    types[summand][token] = row.type;
  }
  // A token without a position has no rows at all: its output is zero.
  __device__ bool is_empty(int token) const { return addresses[kPosition][token] == nullptr; }
  __device__ void clear(int token) {
    for (int summand = 0; summand < kSummands; ++summand) addresses[summand][token] = nullptr;
  }
};

// One token's search for its rows. A value out of bounds is a fault and leaves the token without any.
template <int kWindow>
class RowFinder {
 public:
  using Rows = SummandRows<num_summands(kWindow)>;

  __device__ RowFinder(const PlotMergeArguments& arguments, int64_t t, const TokenSequence& sequence)
      : a_(arguments), t_(t), sequence_(sequence), is_valid_(sequence.index >= 0) {}

  __device__ void find(Rows& rows, int token) {
    rows.clear(token);
    if (!is_valid_) return;
    rows.set(kPosition, token, position_row());
    const DeviceTable* unigrams = unigram_table();
    if constexpr (kWindow == 2) {
      find_bigrams(rows, token, unigrams);
    } else {
      find_trigrams(rows, token, unigrams);
    }
    if (!is_valid_) rows.clear(token);
  }

 private:
  // U + (left - U) + (right - U) is left + right - U, or the one that is there, or U alone.
  __device__ void find_bigrams(Rows& rows, int token, const DeviceTable* unigrams) {
    const int64_t left = has_left() ? a_.references[t_ - 1] : kMissing;
    const int64_t right = has_right() ? a_.references[t_] : kMissing;
    rows.set(kFromLeft, token, table_row(left, 1));
    rows.set(kFromRight, token, table_row(right, 0));
    rows.set(kUnigram, token, unigram_row(unigrams, left != kMissing, right != kMissing));
  }

  __device__ void find_trigrams(Rows& rows, int token, const DeviceTable* unigrams) {
    if (has_left()) rows.set(kFromLeft, token, table_row(window_or_side(t_ - 1, 2), 2));
    if (has_right()) rows.set(kFromRight, token, table_row(window_or_side(t_ + 1, 1), 0));
    const int64_t whole = a_.references[t_ * 3];
    const int64_t left = whole != kMissing ? whole : a_.references[t_ * 3 + 1];
    const int64_t right = whole != kMissing ? kMissing : a_.references[t_ * 3 + 2];
    rows.set(kCenter, token, table_row(left, 1));
    rows.set(kCenterOfRight, token, table_row(right, 1));
    if (whole == kMissing) rows.set(kUnigram, token, unigram_row(unigrams, left != kMissing, right != kMissing));
  }

  __device__ bool has_left() const { return t_ > sequence_.begin; }
  __device__ bool has_right() const { return t_ + 1 < sequence_.end; }

  // The reference of the window at t or, where that is missing, of its bigram in the column.
  __device__ int64_t window_or_side(int64_t t, int column) const {
    const int64_t whole = a_.references[t * 3];
    return whole != kMissing ? whole : a_.references[t * 3 + column];
  }

  __device__ SummandRow table_row(int64_t reference, int slot) {
    if (reference == kMissing) return {};
    const int64_t table = reference >> kRowBits;
    const int64_t row = reference & ((int64_t{1} << kRowBits) - 1);
    if (reference < 0 || table >= a_.num_row_tables || row >= a_.row_tables[table].num_rows) {
      return refuse(Fault::kReferences, t_);
    }
    return row_at(a_.row_tables[table], row * kWindow + slot);
  }

  // U where both rows are missing, -U where both are there, none where one is.
  __device__ SummandRow unigram_row(const DeviceTable* table, bool has_left_row, bool has_right_row) {
    if (table == nullptr || has_left_row != has_right_row) return {};
    const int64_t id = a_.input_ids[t_];
    if (id < 0 || id >= table->num_rows) return refuse(Fault::kInputIds, t_);
    SummandRow row = row_at(*table, id);
    if (has_left_row) row.scale = -1.0f;
    return row;
  }

  __device__ const DeviceTable* unigram_table() {
    const int32_t table = a_.sequence_unigram_tables[sequence_.index];
    if (table >= 0 && table < a_.num_unigram_tables) return &a_.unigram_tables[table];
    refuse(Fault::kUnigramTables, sequence_.index);
    return nullptr;
  }

  __device__ SummandRow position_row() {
    const int64_t position = t_ - sequence_.begin;
    if (position >= a_.num_positions) return refuse(Fault::kPositions, sequence_.index);
    return row_at({a_.position_embeddings, nullptr, a_.num_positions, a_.data_type}, position);
  }

  __device__ SummandRow row_at(const DeviceTable& table, int64_t index) const {
    const int64_t offset = index * a_.hidden_size * size_of(table.data_type);
    const float scale = table.data_type == DataType::kInt8 ? table.scales[index] : 1.0f;
    return {static_cast<const char*>(table.rows) + offset, scale, table.data_type};
  }

  __device__ SummandRow refuse(Fault kind, int64_t position) {
    report_fault(a_.fault, fault_word(kind, position));
    is_valid_ = false;
    return {};
  }

  const PlotMergeArguments& a_;
  int64_t t_;
  TokenSequence sequence_;
  bool is_valid_;
};

}  // namespace hmi::cuda
