#include "cpu/ngram_counter.h"

#include <algorithm>
#include <atomic>
#include <new>
#include <stdexcept>
#include <string>

#include "common/first_error.h"
#include "common/ngram_key.h"
#include "common/parallel.h"

namespace hmi {
namespace {

constexpr int kShardBits = 4;
constexpr int kNumShards = 1 << kShardBits;
constexpr size_t kFirstCapacity = 64;
constexpr int64_t kPrefetchDistance = 8;
// A chunk is partitioned by shard, then its shards are counted; its keys stay in the second-level cache.
constexpr int64_t kTokensPerPart = 8192;
constexpr int64_t kPartsPerChunk = 32;

// The shard takes the low bits of the mixed key, the slot in its table the high ones.
int shard_of(int64_t key) { return static_cast<int>(mix_key(key) & (kNumShards - 1)); }
size_t home_slot(int64_t key, size_t capacity) {
  return static_cast<size_t>((static_cast<unsigned __int128>(mix_key(key)) * capacity) >> 64);
}

// The keys of a range of tokens, sorted by shard.
struct Part {
  std::vector<int64_t> keys;
  int64_t shard_begin[kNumShards + 1];
};

// The keys of the n-grams that start in [begin, end); they may reach beyond it, never out of their sequence.
void collect_keys(const PackedSequences& p, int order, int64_t begin, int64_t end, std::vector<int64_t>& keys) {
  keys.clear();
  for (int64_t s = p.sequence_of(begin); begin < end; ++s) {
    const int64_t last_start = p.offsets[s + 1] - order;
    const int32_t* ids = p.input_ids;
    for (int64_t t = begin; t <= std::min(end - 1, last_start); ++t) {
      keys.push_back(ngram_key(ids[t], order > 1 ? ids[t + 1] : kAbsent, order > 2 ? ids[t + 2] : kAbsent));
    }
    begin = p.offsets[s + 1];
  }
}

void partition(const PackedSequences& p, int order, int64_t begin, int64_t end, Part& part) {
  std::vector<int64_t> keys;
  keys.reserve(end - begin);
  collect_keys(p, order, begin, end, keys);
  int64_t next[kNumShards] = {};
  for (const int64_t key : keys) ++next[shard_of(key)];
  int64_t position = 0;
  for (int shard = 0; shard < kNumShards; ++shard) {
    part.shard_begin[shard] = position;
    position += next[shard];
    next[shard] = part.shard_begin[shard];
  }
  part.shard_begin[kNumShards] = position;
  part.keys.resize(keys.size());
  for (const int64_t key : keys) part.keys[next[shard_of(key)]++] = key;
}

// Runs body(task) for every task and throws std::bad_alloc afterwards if one ran out of memory.
template <class Body>
void parallel_allocating(int num_threads, int64_t num_tasks, const Body& body) {
  std::atomic<bool> out_of_memory{false};
  parallel_for(num_threads, num_tasks, [&](int64_t task, int) noexcept {
    try {
      body(task);
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

void check_token_ids(const PackedSequences& p) {
  const int32_t* end = p.input_ids + p.num_tokens;
  const int32_t* bad = std::find_if_not(p.input_ids, end, is_token_id);
  if (bad != end) {
    throw std::invalid_argument("input_ids[" + std::to_string(bad - p.input_ids) + "] is " + std::to_string(*bad) +
                                ", but token ids lie in 0.." + std::to_string(kMaxTokenId));
  }
}

bool by_key(const KeyCount& a, const KeyCount& b) { return a.key < b.key; }

}  // namespace

KeyCount& CountTable::locate(int64_t key) {
  size_t position = home_slot(key, slots_.size());
  while (slots_[position].key != key && slots_[position].key != 0) position = (position + 1) & (slots_.size() - 1);
  return slots_[position];
}

void CountTable::prefetch(int64_t key) const {
  if (!slots_.empty()) __builtin_prefetch(&slots_[home_slot(key, slots_.size())], 1);
}

void CountTable::increment(int64_t key) {
  if (2 * static_cast<size_t>(size_) >= slots_.size()) grow();
  KeyCount& slot = locate(key);
  size_ += slot.key == 0;
  slot = {key, slot.count + 1};
}

void CountTable::grow() {
  std::vector<KeyCount> old(std::max(kFirstCapacity, 2 * slots_.size()));
  old.swap(slots_);
  for (const KeyCount& item : old) {
    if (item.key != 0) locate(item.key) = item;
  }
}

void CountTable::append_items(int64_t min_count, std::vector<KeyCount>& items) const {
  for (const KeyCount& item : slots_) {
    if (item.key != 0 && item.count >= min_count) items.push_back(item);
  }
}

NgramCounter::NgramCounter(int order) : order_(order), shards_(kNumShards) {
  if (order < 1 || order > kMaxSlots) {
    throw std::invalid_argument("order must be 1, 2 or 3, not " + std::to_string(order));
  }
}

void NgramCounter::add(const PackedSequences& sequences, int num_threads) {
  sequences.check();
  check_token_ids(sequences);
  const int64_t step = kTokensPerPart * kPartsPerChunk;
  for (int64_t begin = 0; begin < sequences.num_tokens; begin += step) {
    count_chunk(sequences, begin, std::min(sequences.num_tokens, begin + step), num_threads);
  }
  for (int64_t s = 0; s < sequences.num_sequences; ++s) {
    total_ += std::max<int64_t>(0, sequences.offsets[s + 1] - sequences.offsets[s] - order_ + 1);
  }
}

void NgramCounter::count_chunk(const PackedSequences& sequences, int64_t begin, int64_t end, int num_threads) {
  const int64_t num_parts = (end - begin + kTokensPerPart - 1) / kTokensPerPart;
  std::vector<Part> parts(num_parts);
  const int threads = threads_for(num_threads, num_parts, 1);
  parallel_allocating(threads, num_parts, [&](int64_t i) {
    const int64_t from = begin + i * kTokensPerPart;
    partition(sequences, order_, from, std::min(end, from + kTokensPerPart), parts[i]);
  });
  parallel_allocating(threads, kNumShards, [&](int64_t shard) {
    for (const Part& part : parts) {
      const int64_t stop = part.shard_begin[shard + 1];
      for (int64_t i = part.shard_begin[shard]; i < stop; ++i) {
        if (i + kPrefetchDistance < stop) shards_[shard].prefetch(part.keys[i + kPrefetchDistance]);
        shards_[shard].increment(part.keys[i]);
      }
    }
  });
}

int64_t NgramCounter::size() const {
  int64_t size = 0;
  for (const CountTable& shard : shards_) size += shard.size();
  return size;
}

int64_t NgramCounter::memory_bytes() const {
  int64_t bytes = sizeof(*this);
  for (const CountTable& shard : shards_) bytes += shard.memory_bytes();
  return bytes;
}

std::vector<KeyCount> NgramCounter::take_shard(int shard) {
  if (shard < 0 || shard >= num_shards()) {
    throw std::invalid_argument("shard must lie in 0.." + std::to_string(num_shards() - 1) + ", not " +
                                std::to_string(shard));
  }
  std::vector<KeyCount> items;
  items.reserve(shards_[shard].size());
  shards_[shard].append_items(1, items);
  shards_[shard] = CountTable();
  std::sort(items.begin(), items.end(), by_key);
  return items;
}

std::vector<KeyCount> NgramCounter::items(int64_t min_count, int num_threads) const {
  std::vector<std::vector<KeyCount>> runs(kNumShards);
  const int threads = size() > kTokensPerPart ? num_threads : 1;
  parallel_allocating(threads, kNumShards, [&](int64_t shard) {
    shards_[shard].append_items(min_count, runs[shard]);
    std::sort(runs[shard].begin(), runs[shard].end(), by_key);
  });
  // Pairs of sorted runs are merged until one is left.
  for (int64_t num_runs = kNumShards; num_runs > 1; num_runs /= 2) {
    std::vector<std::vector<KeyCount>> merged(num_runs / 2);
    parallel_allocating(threads, num_runs / 2, [&](int64_t i) {
      const std::vector<KeyCount>&left = runs[2 * i], &right = runs[2 * i + 1];
      merged[i].resize(left.size() + right.size());
      std::merge(left.begin(), left.end(), right.begin(), right.end(), merged[i].begin(), by_key);
    });
    runs.swap(merged);
  }
  return std::move(runs[0]);
}

}  // namespace hmi
