#include "cpu/plot_merge.h"

#include <stdexcept>
#include <string>

#include "common/first_error.h"
#include "common/parallel.h"
#include "cpu/plot_lookup.h"
#include "cpu/simd/dispatch.h"

namespace hmi {
namespace {

constexpr int64_t kTokensPerTask = 128;
constexpr int kMaxSources = 5;
// Rows are fetched this many tokens before they are summed (a power of two).
constexpr int64_t kPrefetchDistance = 4;
constexpr int64_t kCacheLine = 64;
// All of a row of up to 1024 halves: the hardware's own prefetcher is too slow to start within a row.
constexpr int64_t kPrefetchedBytes = 2048;

enum Column { kWindow, kLeft, kRight };

// The rows whose sum is one token's state before its position is added.
struct TokenSources {
  MergeSource sources[kMaxSources];
  int count;
  bool subtract_last;
};

// One worker's walk over the tokens of a range that lie in one sequence.
class MergeRange {
 public:
  MergeRange(const PlotMergeArguments& arguments, const SimdKernels& kernels, FirstError& error)
      : a_(arguments), kernels_(kernels), error_(error) {}

  void run(int64_t begin, int64_t end) noexcept {
    for (int64_t s = a_.sequences.sequence_of(begin); begin < end; ++s) {
      sequence_begin_ = a_.sequences.offsets[s];
      sequence_end_ = a_.sequences.offsets[s + 1];
      unigrams_ = &a_.unigram_tables[a_.sequence_unigram_tables[s]];
      const int64_t stop = std::min(end, sequence_end_);
      merge_tokens(begin, stop);
      begin = stop;
    }
  }

 private:
  void merge_tokens(int64_t begin, int64_t end) noexcept {
    TokenSources ring[kPrefetchDistance];
    for (int64_t ahead = begin; ahead < end + kPrefetchDistance; ++ahead) {
      const int64_t t = ahead - kPrefetchDistance;
      TokenSources& entry = ring[ahead % kPrefetchDistance];
      if (t >= begin) merge(t, entry);
      if (ahead < end) {
        entry = a_.window == 2 ? bigram_sources(ahead) : trigram_sources(ahead);
        prefetch(entry);
      }
    }
  }

  void merge(int64_t t, const TokenSources& from) noexcept {
    if (from.count == 0) return;  // reported
    kernels_.merge_row({from.sources, from.count, from.subtract_last,
                        a_.position_embeddings + (t - sequence_begin_) * a_.hidden_size, a_.layer_norm_weight,
                        a_.layer_norm_bias, a_.layer_norm_epsilon, a_.hidden_size, a_.output + t * a_.hidden_size});
  }

  // NOTE: inlined by force, as GCC takes a function that only prefetches for one without effect and drops the call.
  [[gnu::always_inline]] void prefetch(const TokenSources& from) const noexcept {
    for (int i = 0; i < from.count; ++i) {
      const char* row = static_cast<const char*>(from.sources[i].row);
      const int64_t bytes = row_bytes(from.sources[i].type, from.sources[i].piece_size, a_.hidden_size);
      for (int64_t at = 0; at < std::min(bytes, kPrefetchedBytes); at += kCacheLine) __builtin_prefetch(row + at);
    }
  }

  // U + (left - U) + (right - U) is left + right - U, or the one whose neighbor is there, or U alone.
  TokenSources bigram_sources(int64_t t) noexcept {
    TokenSources to{};
    if (t > sequence_begin_) add_row_or_unigram(to, t, reference(t - 1, kWindow), 1, kBesideLeftMask);
    if (t + 1 < sequence_end_) add_row_or_unigram(to, t, reference(t, kWindow), 0, kBesideRightMask);
    if (to.count != 1) add_unigram(to, t, kAlone);
    to.subtract_last = to.count == 3;
    return to;
  }

  TokenSources trigram_sources(int64_t t) noexcept {
    TokenSources to{};
    if (t > sequence_begin_) add_neighbor(to, t, t - 1, kRight, 2);
    if (t + 1 < sequence_end_) add_neighbor(to, t, t + 1, kLeft, 0);
    if (reference(t, kWindow) != kMissing) {
      add_row(to, t, reference(t, kWindow), 1);
      return to;
    }
    const int before = to.count;
    add_row(to, t, reference(t, kLeft), 1);
    add_row(to, t, reference(t, kRight), 1);
    if (to.count - before != 1) add_unigram(to, t, 1);
    to.subtract_last = to.count - before == 3;
    return to;
  }

  // What the window at the neighbor says of token t, or its bigram on t's side, or the token itself.
  void add_neighbor(TokenSources& to, int64_t t, int64_t neighbor, Column side, int slot) noexcept {
    const int64_t whole = reference(neighbor, kWindow);
    add_row_or_unigram(to, t, whole != kMissing ? whole : reference(neighbor, side), slot, slot);
  }

  void add_row_or_unigram(TokenSources& to, int64_t t, int64_t reference, int slot, int unigram_slot) noexcept {
    if (reference == kMissing) {
      add_unigram(to, t, unigram_slot);
    } else {
      add_row(to, t, reference, slot);
    }
  }

  int64_t reference(int64_t t, Column column) const { return a_.references[t * (a_.window == 2 ? 1 : 3) + column]; }

  void add_row(TokenSources& to, int64_t t, int64_t reference, int slot) noexcept {
    if (reference == kMissing) return;
    const int64_t table = reference >> kRowBits;
    const int64_t row = reference & ((int64_t{1} << kRowBits) - 1);
    if (reference < 0 || table >= static_cast<int64_t>(a_.row_tables.size()) || row >= a_.row_tables[table].num_rows) {
      return error_.report(t);
    }
    push(to, a_.row_tables[table], row * a_.window + slot, slot);
  }

  void add_unigram(TokenSources& to, int64_t t, int slot) noexcept {
    const int64_t id = a_.sequences.input_ids[t];
    if (id < 0 || id >= unigrams_->num_rows) return error_.report(t);
    push(to, *unigrams_, id * kUnigramSlots + slot, slot);
  }

  void push(TokenSources& to, const RowTable& table, int64_t index, int slot) const noexcept {
    to.sources[to.count++] = row_source(table, index, slot, a_.hidden_size);
  }

  const PlotMergeArguments& a_;
  const SimdKernels& kernels_;
  FirstError& error_;
  int64_t sequence_begin_ = 0;
  int64_t sequence_end_ = 0;
  const RowTable* unigrams_ = nullptr;
};

void check_sequences(const PlotMergeArguments& a) {
  a.sequences.check();
  const int64_t num_tables = static_cast<int64_t>(a.unigram_tables.size());
  for (int64_t s = 0; s < a.sequences.num_sequences; ++s) {
    const int64_t length = a.sequences.offsets[s + 1] - a.sequences.offsets[s];
    if (length > a.num_positions) {
      throw std::invalid_argument("sequence " + std::to_string(s) + " has " + std::to_string(length) +
                                  " tokens, but position_embeddings has " + std::to_string(a.num_positions) + " rows");
    }
    if (a.sequence_unigram_tables[s] < 0 || a.sequence_unigram_tables[s] >= num_tables) {
      throw std::invalid_argument("sequence_unigram_tables[" + std::to_string(s) + "] is " +
                                  std::to_string(a.sequence_unigram_tables[s]) + ", but there are " +
                                  std::to_string(num_tables) + " unigram_tables");
    }
  }
}

}  // namespace

void plot_merge(const PlotMergeArguments& arguments, int num_threads) {
  check_sequences(arguments);
  const int64_t num_tokens = arguments.sequences.num_tokens;
  const int64_t num_tasks = (num_tokens + kTokensPerTask - 1) / kTokensPerTask;
  const SimdKernels& kernels = active_kernels();
  FirstError error;
  parallel_for(threads_for(num_threads, num_tasks, 1), num_tasks, [&](int64_t task, int) noexcept {
    const int64_t begin = task * kTokensPerTask;
    MergeRange(arguments, kernels, error).run(begin, std::min(num_tokens, begin + kTokensPerTask));
  });
  if (error.any()) {
    throw std::invalid_argument("token " + std::to_string(error.position()) + " (id " +
                                std::to_string(arguments.sequences.input_ids[error.position()]) +
                                ") needs a row that its table does not have: references or input_ids do not belong to "
                                "these row_tables and unigram_tables");
  }
}

}  // namespace hmi
