// Which rows a token is summed of: the addresses that plot_merge loads from, found by one thread a token before any row
// is loaded. See csrc/cpu/plot_merge.h for the formulas.
#pragma once

#include "common/data_type.h"
#include "cpu/plot_lookup.h"
#include "cpu/plot_merge.h"
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

// What the codes of a row stand for: code m is one of the 256 pieces from m * 256 on.
struct Codebook {
  const void* pieces = nullptr;
  int32_t piece_size = 0;
};

// Where a summand lies. Its value is factor * row or, for int8, factor * *scale * row.
struct SummandRow {
  const void* address = nullptr;  // null for none
  const float* scale = nullptr;   // null for none
  float factor = 1.0f;
  DataType type = DataType::kFloat32;
  Codebook codebook;
};

// Only kernels for tables of codes have room for codebooks.
template <int kSummands, bool kHasCodes>
struct SummandCodebooks {
  Codebook codebooks[kSummands][kMaxMergeTokens];
  __device__ void set(int summand, int token, const Codebook& codebook) { codebooks[summand][token] = codebook; }
  __device__ Codebook of(int summand, int token) const { return codebooks[summand][token]; }
};
template <int kSummands>
struct SummandCodebooks<kSummands, false> {
  __device__ void set(int, int, const Codebook&) {}
  __device__ Codebook of(int, int) const { return {}; }
};

// Those of a block's tokens, in shared memory. One array for each field: neighboring threads write neighboring words.
template <int kSummands, bool kHasCodes>
struct SummandRows {
  SummandCodebooks<kSummands, kHasCodes> codebooks;
  const void* addresses[kSummands][kMaxMergeTokens];
  float scales[kSummands][kMaxMergeTokens];
  DataType types[kSummands][kMaxMergeTokens];

  __device__ void set(int summand, int token, const SummandRow& row, float scale) {
    addresses[summand][token] = row.address;
    scales[summand][token] = scale;
    types[summand][token] = row.type;
    codebooks.set(summand, token, row.codebook);
  }
  // A token without a position has no rows at all: its output is zero.
  __device__ bool is_empty(int token) const { return addresses[kPosition][token] == nullptr; }
};

// One token's search for its rows. A value out of bounds is a fault and leaves the token without any.
// References, id and table come in loads that do not wait for each other, and so do the scales after them: this search
// is all latency, and no row is loaded before its end.
template <int kWindow, bool kHasCodes>
class RowFinder {
 public:
  static constexpr int kSummands = num_summands(kWindow);
  using Rows = SummandRows<kSummands, kHasCodes>;

  __device__ RowFinder(const PlotMergeArguments& arguments, int64_t t, const TokenSequence& sequence)
      : a_(arguments), t_(t), sequence_(sequence), is_valid_(sequence.index >= 0) {}

  __device__ void find(Rows& rows, int token) {
    SummandRow found[kSummands];
    if (is_valid_) find(found);
    float scales[kSummands];
#pragma unroll
    for (int summand = 0; summand < kSummands; ++summand) {
      if (!is_valid_) found[summand] = {};
      scales[summand] = 1.0f;
      if (found[summand].scale != nullptr) scales[summand] = load_scale(found[summand].scale);
    }
#pragma unroll
    for (int summand = 0; summand < kSummands; ++summand) {
      rows.set(summand, token, found[summand], found[summand].factor * scales[summand]);
    }
  }

 private:
  static constexpr int kColumns = kWindow == 2 ? 1 : 3;  // of references
  enum Column : int { kWhole, kLeft, kRight };

  __device__ void find(SummandRow (&found)[kSummands]) {
    const int64_t id = a_.input_ids[t_];
    const int32_t unigrams = a_.sequence_unigram_tables[sequence_.index];
    if constexpr (kWindow == 2) {
      find_bigrams(found, unigrams, id);
    } else {
      find_trigrams(found, unigrams, id);
    }
    found[kPosition] = position_row();
    if (unigrams < 0 || unigrams >= a_.num_unigram_tables) refuse(Fault::kUnigramTables, sequence_.index);
  }

  // U + (left - U) + (right - U) is left + right - U, or the one whose neighbor is there, or U alone.
  __device__ void find_bigrams(SummandRow (&found)[kSummands], int32_t unigrams, int64_t id) {
    const int64_t left = reference(has_left(), t_ - 1, kWhole);
    const int64_t right = reference(has_right(), t_, kWhole);
    if (has_left()) found[kFromLeft] = left != kMissing ? table_row(left, 1) : unigram_row(unigrams, id, kBesideLeftMask);
    if (has_right()) {
      found[kFromRight] = right != kMissing ? table_row(right, 0) : unigram_row(unigrams, id, kBesideRightMask);
    }
    found[kUnigram] = unigram_left_over(unigrams, id, kAlone, has_left(), has_right());
  }

  // Of each neighbor its window or, where that is missing, its bigram on our side or else the token itself; of the
  // token its window or both bigrams.
  __device__ void find_trigrams(SummandRow (&found)[kSummands], int32_t unigrams, int64_t id) {
    const int64_t left_whole = reference(has_left(), t_ - 1, kWhole);
    const int64_t left_side = reference(has_left(), t_ - 1, kRight);
    const int64_t right_whole = reference(has_right(), t_ + 1, kWhole);
    const int64_t right_side = reference(has_right(), t_ + 1, kLeft);
    const int64_t whole = reference(true, t_, kWhole);
    const int64_t left = reference(true, t_, kLeft);
    const int64_t right = reference(true, t_, kRight);
    const int64_t from_left = left_whole != kMissing ? left_whole : left_side;
    const int64_t from_right = right_whole != kMissing ? right_whole : right_side;
    if (has_left()) found[kFromLeft] = from_left != kMissing ? table_row(from_left, 2) : unigram_row(unigrams, id, 2);
    if (has_right()) {
      found[kFromRight] = from_right != kMissing ? table_row(from_right, 0) : unigram_row(unigrams, id, 0);
    }
    found[kCenter] = table_row(whole != kMissing ? whole : left, 1);
    if (whole != kMissing) return;
    found[kCenterOfRight] = table_row(right, 1);
    found[kUnigram] = unigram_left_over(unigrams, id, 1, left != kMissing, right != kMissing);
  }

  __device__ bool has_left() const { return t_ > sequence_.begin; }
  __device__ bool has_right() const { return t_ + 1 < sequence_.end; }

  // kMissing unless that token is there. Always loads, as a branch would wait for the loads before it.
  __device__ int64_t reference(bool is_there, int64_t t, Column column) const {
    const int64_t loaded = a_.references[(is_there ? t : t_) * kColumns + column];
    return is_there ? loaded : kMissing;
  }

  __device__ SummandRow table_row(int64_t reference, int slot) {
    if (reference == kMissing) return {};
    const int64_t table = reference >> kRowBits;
    const int64_t row = reference & ((int64_t{1} << kRowBits) - 1);
    if (reference < 0 || table >= a_.num_row_tables || row >= a_.row_tables[table].num_rows) {
      return refuse(Fault::kReferences, t_);
    }
    return row_at(a_.row_tables[table], row * kWindow + slot, slot);
  }

  // Empty for a table out of bounds: find() reports that.
  __device__ SummandRow unigram_row(int32_t table, int64_t id, int slot) {
    if (table < 0 || table >= a_.num_unigram_tables) return {};
    if (id < 0 || id >= a_.unigram_tables[table].num_rows) return refuse(Fault::kInputIds, t_);
    return row_at(a_.unigram_tables[table], id * kUnigramSlots + slot, slot);
  }

  // U where both are missing, -U where both are there, none where one is.
  __device__ SummandRow unigram_left_over(int32_t table, int64_t id, int slot, bool has_first, bool has_second) {
    if (has_first != has_second) return {};
    SummandRow row = unigram_row(table, id, slot);
    row.factor = has_first ? -1.0f : 1.0f;
    return row;
  }

  __device__ SummandRow position_row() {
    const int64_t position = t_ - sequence_.begin;
    if (position >= a_.num_positions) return refuse(Fault::kPositions, sequence_.index);
    return row_at({a_.position_embeddings, nullptr, a_.num_positions, a_.data_type, 0}, position, 0);
  }

  __device__ SummandRow row_at(const DeviceTable& table, int64_t index, int slot) const {
    SummandRow row;
    row.type = table.data_type;
    if (kHasCodes && table.data_type == DataType::kCode) {
      const int num_codes = a_.hidden_size / table.piece_size;
      row.address = static_cast<const char*>(table.rows) + index * num_codes;
      const int64_t elements_before = int64_t{slot} * kCodebookSize * a_.hidden_size;
      row.codebook = {static_cast<const char*>(table.decoding) + elements_before * 2, table.piece_size};
      return row;
    }
    row.address = static_cast<const char*>(table.rows) + index * a_.hidden_size * size_of(table.data_type);
    if (table.data_type == DataType::kInt8) row.scale = static_cast<const float*>(table.decoding) + index;
    return row;
  }

  static __device__ float load_scale(const float* address) {
    const unsigned bits = load4_once(address);
    float scale;
    __builtin_memcpy(&scale, &bits, sizeof(scale));
    return scale;
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
