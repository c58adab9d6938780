// Counts n-grams over many batches in hash tables, one per shard of the keys, so that threads never share a table.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "common/packed_sequences.h"

namespace hmi {

struct KeyCount {
  int64_t key;
  int64_t count;
};

// An open-addressing table from key to count, at most half full. Key 0 marks an empty slot.
class CountTable {
 public:
  void prefetch(int64_t key) const;
  void increment(int64_t key);
  int64_t size() const { return size_; }
  int64_t memory_bytes() const { return static_cast<int64_t>(slots_.size() * sizeof(KeyCount)); }
  void append_items(int64_t min_count, std::vector<KeyCount>& items) const;

 private:
  KeyCount& locate(int64_t key);
  void grow();

  std::vector<KeyCount> slots_;
  int64_t size_ = 0;
};

class NgramCounter {
 public:
  // order 1, 2 or 3: every run of so many tokens inside a sequence counts, in slots 0..order-1 of its key. Throws
  // std::invalid_argument on another order.
  explicit NgramCounter(int order);

  // Throws std::invalid_argument, and counts nothing, on bad offsets and on a token id that no key can hold.
  void add(const PackedSequences& sequences, int num_threads);

  int order() const { return order_; }
  int64_t size() const;   // distinct n-grams
  int64_t total() const { return total_; }  // n-grams seen
  int64_t memory_bytes() const;
  // Those seen at least min_count times, by ascending key.
  std::vector<KeyCount> items(int64_t min_count, int num_threads) const;
  int num_shards() const { return static_cast<int>(shards_.size()); }
  // One shard's n-grams by ascending key. The counter forgets them and gives their memory back; total() stays.
  std::vector<KeyCount> take_shard(int shard);

 private:
  void count_chunk(const PackedSequences& sequences, int64_t begin, int64_t end, int num_threads);

  int order_;
  int64_t total_ = 0;
  std::vector<CountTable> shards_;
};

}  // namespace hmi
