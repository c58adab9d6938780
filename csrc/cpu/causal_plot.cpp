#include "cpu/causal_plot.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/first_error.h"
#include "common/ngram_key.h"
#include "common/parallel.h"
#include "cpu/plot_lookup.h"
#include "cpu/simd/dispatch.h"

namespace hmi {
namespace {

constexpr int64_t kLookupTokensPerTask = 2048;
constexpr int64_t kMergeTokensPerTask = 128;
// Keys of a group are formed, and their slots fetched, before the first of them is searched.
constexpr int64_t kTokensPerGroup = 32;

void check_chains(const CausalLookupArguments& a) {
  const int64_t num_tables = static_cast<int64_t>(a.indexes.size());
  for (int64_t i = 0; i < a.num_chains * a.chain_width; ++i) {
    if (a.chains[i] < -1 || a.chains[i] >= num_tables) {
      throw std::invalid_argument("chains[" + std::to_string(i / a.chain_width) + ", " +
                                  std::to_string(i % a.chain_width) + "] is " + std::to_string(a.chains[i]) +
                                  ", but there are " + std::to_string(num_tables) + " indexes");
    }
  }
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    if (a.token_chains[t] < 0 || a.token_chains[t] >= a.num_chains) {
      throw std::invalid_argument("token_chains[" + std::to_string(t) + "] is " + std::to_string(a.token_chains[t]) +
                                  ", but there are " + std::to_string(a.num_chains) + " chains");
    }
  }
}

// A text has at least one token in a window, and none behind an absent one.
bool is_window(const int32_t* window) {
  if (!is_token_id(window[0])) return false;
  if (!is_token_id(window[1])) return window[1] == kAbsent && window[2] == kAbsent;
  return is_token_id(window[2]) || window[2] == kAbsent;
}

class CausalSearch {
 public:
  explicit CausalSearch(const CausalLookupArguments& arguments) : a_(arguments) {}

  void run(int64_t begin, int64_t end, FirstError& bad_window) const noexcept {
    int64_t keys[kTokensPerGroup];
    for (int64_t first = begin; first < end; first += kTokensPerGroup) {
      const int64_t last = std::min(end, first + kTokensPerGroup);
      for (int64_t t = first; t < last; ++t) {
        const bool valid = is_window(window(t));
        if (!valid) bad_window.report(t);
        keys[t - first] = prefetched(t, valid && window(t)[1] != kAbsent ? whole_key(t) : kNoKey);
      }
      for (int64_t t = first; t < last; ++t) {
        const int64_t found = search(t, keys[t - first]);
        a_.references[t * kCausalColumns] = found;
        const bool is_shorter = found == kMissing && keys[t - first] != kNoKey && window(t)[2] != kAbsent;
        keys[t - first] = is_shorter ? prefetched(t, ngram_key(window(t)[1], window(t)[2], kAbsent)) : kNoKey;
      }
      for (int64_t t = first; t < last; ++t) a_.references[t * kCausalColumns + 1] = search(t, keys[t - first]);
    }
  }

 private:
  const int32_t* window(int64_t t) const { return a_.windows + t * kCausalSlots; }
  const int32_t* chain(int64_t t) const { return a_.chains + a_.token_chains[t] * a_.chain_width; }
  int64_t whole_key(int64_t t) const { return ngram_key(window(t)[0], window(t)[1], window(t)[2]); }

  int64_t prefetched(int64_t t, int64_t key) const {
    for (int64_t d = 0; key != kNoKey && d < a_.chain_width && chain(t)[d] >= 0; ++d) {
      __builtin_prefetch(a_.indexes[chain(t)[d]].home(key));
    }
    return key;
  }

  int64_t search(int64_t t, int64_t key) const {
    for (int64_t d = 0; key != kNoKey && d < a_.chain_width && chain(t)[d] >= 0; ++d) {
      const int64_t row = a_.indexes[chain(t)[d]].find(key);
      if (row != kMissing) return int64_t{chain(t)[d]} << kRowBits | row;
    }
    return kMissing;
  }

  const CausalLookupArguments& a_;
};

void check_tokens(const CausalMergeArguments& a) {
  const int64_t num_tables = static_cast<int64_t>(a.unigram_tables.size());
  for (int64_t t = 0; t < a.num_tokens; ++t) {
    if (a.positions[t] < 0 || a.positions[t] >= a.num_positions) {
      throw std::invalid_argument("positions[" + std::to_string(t) + "] is " + std::to_string(a.positions[t]) +
                                  ", but position_embeddings has " + std::to_string(a.num_positions) + " rows");
    }
    if (a.token_unigram_tables[t] < 0 || a.token_unigram_tables[t] >= num_tables) {
      throw std::invalid_argument("token_unigram_tables[" + std::to_string(t) + "] is " +
                                  std::to_string(a.token_unigram_tables[t]) + ", but there are " +
                                  std::to_string(num_tables) + " unigram_tables");
    }
  }
}

// The row of token t; false if its table does not have it.
bool find_row(const CausalMergeArguments& a, int64_t t, MergeSource* source) {
  const int64_t* references = a.references + t * kCausalColumns;
  const int64_t reference = references[0] != kMissing ? references[0] : references[1];
  const RowTable* table = &a.unigram_tables[a.token_unigram_tables[t]];
  int64_t row = a.input_ids[t];
  if (reference != kMissing) {
    const int64_t number = reference >> kRowBits;
    if (reference < 0 || number >= static_cast<int64_t>(a.row_tables.size())) return false;
    table = &a.row_tables[number];
    row = reference & ((int64_t{1} << kRowBits) - 1);
  }
  if (row < 0 || row >= table->num_rows) return false;
  *source = row_source(*table, row, 0, a.hidden_size);
  return true;
}

}  // namespace

void causal_lookup(const CausalLookupArguments& arguments, int num_threads) {
  check_chains(arguments);
  const int64_t num_tokens = arguments.num_tokens;
  const int64_t num_tasks = (num_tokens + kLookupTokensPerTask - 1) / kLookupTokensPerTask;
  const CausalSearch search(arguments);
  FirstError bad_window;
  parallel_for(threads_for(num_threads, num_tasks, 1), num_tasks, [&](int64_t task, int) noexcept {
    const int64_t begin = task * kLookupTokensPerTask;
    search.run(begin, std::min(num_tokens, begin + kLookupTokensPerTask), bad_window);
  });
  if (bad_window.any()) {
    throw std::invalid_argument("windows[" + std::to_string(bad_window.position()) +
                                "] must hold 1 to 3 token ids in 0.." + std::to_string(kMaxTokenId) +
                                ", and -1 only behind them");
  }
}

void causal_merge(const CausalMergeArguments& arguments, int num_threads) {
  const CausalMergeArguments& a = arguments;
  check_tokens(a);
  const int64_t num_tasks = (a.num_tokens + kMergeTokensPerTask - 1) / kMergeTokensPerTask;
  const SimdKernels& kernels = active_kernels();
  FirstError error;
  parallel_for(threads_for(num_threads, num_tasks, 1), num_tasks, [&](int64_t task, int) noexcept {
    const int64_t end = std::min(a.num_tokens, (task + 1) * kMergeTokensPerTask);
    for (int64_t t = task * kMergeTokensPerTask; t < end; ++t) {
      MergeSource source;
      if (!find_row(a, t, &source)) {
        error.report(t);
        continue;
      }
      kernels.merge_row({&source, 1, false, a.position_embeddings + a.positions[t] * a.hidden_size,
                         a.layer_norm_weight, a.layer_norm_bias, a.layer_norm_epsilon, a.hidden_size,
                         a.output + t * a.hidden_size});
    }
  });
  if (error.any()) {
    throw std::invalid_argument("token " + std::to_string(error.position()) + " (id " +
                                std::to_string(a.input_ids[error.position()]) +
                                ") needs a row that its table does not have: references or input_ids do not belong to "
                                "these row_tables and unigram_tables");
  }
}

}  // namespace hmi
