#include "cpu/plot_lookup.h"

#include <stdexcept>
#include <string>

#include "common/first_error.h"
#include "common/parallel.h"

namespace hmi {
namespace {

constexpr int64_t kTokensPerTask = 2048;
// Keys of a group are formed, and their slots fetched, before the first of them is searched.
constexpr int64_t kTokensPerGroup = 32;

void check_chains(const PlotLookupArguments& a) {
  const int64_t num_tables = static_cast<int64_t>(a.indexes.size());
  for (int64_t i = 0; i < a.sequences.num_sequences * a.chain_width; ++i) {
    if (a.chains[i] < -1 || a.chains[i] >= num_tables) {
      throw std::invalid_argument("chains[" + std::to_string(i / a.chain_width) + ", " +
                                  std::to_string(i % a.chain_width) + "] is " + std::to_string(a.chains[i]) +
                                  ", but there are " + std::to_string(num_tables) + " indexes");
    }
  }
}

// One worker's walk over a range of tokens.
class LookupRange {
 public:
  LookupRange(const PlotLookupArguments& arguments, FirstError& bad_token)
      : a_(arguments), ids_(arguments.sequences.input_ids), bad_token_(bad_token) {}

  void run(int64_t begin, int64_t end) noexcept {
    const int64_t* offsets = a_.sequences.offsets;
    for (int64_t s = a_.sequences.sequence_of(begin); begin < end; ++s) {
      sequence_begin_ = offsets[s];
      sequence_end_ = offsets[s + 1];
      chain_ = a_.chains + s * a_.chain_width;
      const int64_t stop = std::min(end, sequence_end_);
      for (; begin < stop; begin += kTokensPerGroup) {
        search_group(begin, std::min(stop, begin + kTokensPerGroup));
      }
      begin = stop;
    }
  }

 private:
  void search_group(int64_t begin, int64_t end) noexcept {
    const int columns = a_.window == 2 ? 1 : 3;
    int64_t keys[2][kTokensPerGroup];
    for (int64_t t = begin; t < end; ++t) keys[0][t - begin] = prefetched(window_key(t));
    for (int64_t t = begin; t < end; ++t) a_.references[t * columns] = search(keys[0][t - begin]);
    if (columns == 1) return;
    for (int64_t t = begin; t < end; ++t) {
      const bool hit = a_.references[t * columns] != kMissing;
      keys[0][t - begin] = hit ? kNoKey : prefetched(left_key(t));
      keys[1][t - begin] = hit ? kNoKey : prefetched(right_key(t));
    }
    for (int64_t t = begin; t < end; ++t) {
      a_.references[t * columns + 1] = search(keys[0][t - begin]);
      a_.references[t * columns + 2] = search(keys[1][t - begin]);
    }
  }

  bool has_left(int64_t t) const { return t > sequence_begin_; }
  bool has_right(int64_t t) const { return t + 1 < sequence_end_; }

  int64_t window_key(int64_t t) noexcept {
    if (!is_token_id(ids_[t])) {
      bad_token_.report(t);
      return kNoKey;
    }
    if (a_.window == 2) return has_right(t) ? checked_ngram_key(ids_[t], ids_[t + 1], kAbsent) : kNoKey;
    return checked_ngram_key(has_left(t) ? ids_[t - 1] : kAbsent, ids_[t], has_right(t) ? ids_[t + 1] : kAbsent);
  }
  // A neighbour that is no token id is reported at its own position; here it only must not form a key.
  int64_t left_key(int64_t t) const {
    return has_left(t) ? checked_ngram_key(ids_[t - 1], ids_[t], kAbsent) : kNoKey;
  }
  int64_t right_key(int64_t t) const {
    return has_right(t) ? checked_ngram_key(kAbsent, ids_[t], ids_[t + 1]) : kNoKey;
  }

  int64_t prefetched(int64_t key) const {
    for (int64_t d = 0; key != kNoKey && d < a_.chain_width && chain_[d] >= 0; ++d) {
      __builtin_prefetch(a_.indexes[chain_[d]].home(key));
    }
    return key;
  }

  int64_t search(int64_t key) const {
    for (int64_t d = 0; key != kNoKey && d < a_.chain_width && chain_[d] >= 0; ++d) {
      const int64_t row = a_.indexes[chain_[d]].find(key);
      if (row != kMissing) return int64_t{chain_[d]} << kRowBits | row;
    }
    return kMissing;
  }

  const PlotLookupArguments& a_;
  const int32_t* ids_;
  FirstError& bad_token_;
  int64_t sequence_begin_ = 0;
  int64_t sequence_end_ = 0;
  const int32_t* chain_ = nullptr;
};

}  // namespace

void plot_lookup(const PlotLookupArguments& arguments, int num_threads) {
  arguments.sequences.check();
  check_chains(arguments);
  const int64_t num_tokens = arguments.sequences.num_tokens;
  const int64_t num_tasks = (num_tokens + kTokensPerTask - 1) / kTokensPerTask;
  FirstError bad_token;
  parallel_for(threads_for(num_threads, num_tasks, 1), num_tasks, [&](int64_t task, int) noexcept {
    const int64_t begin = task * kTokensPerTask;
    LookupRange(arguments, bad_token).run(begin, std::min(num_tokens, begin + kTokensPerTask));
  });
  if (bad_token.any()) {
    throw std::invalid_argument("input_ids[" + std::to_string(bad_token.position()) + "] is " +
                                std::to_string(arguments.sequences.input_ids[bad_token.position()]) +
                                ", but token ids lie in 0.." + std::to_string(kMaxTokenId));
  }
}

}  // namespace hmi
