// The frequent keys of a stream in bounded memory: Misra and Gries 1982, with weights and a purge of many counters at
// once as in Anderson, Bevan, Lang, Liberty, Rhodes, Thaler, "A high-performance algorithm for identifying frequent
// items in data streams", IMC 2017. Sketches merge: Agarwal et al., "Mergeable summaries", PODS 2012.
//
// A table that is full takes the weight d at its lowest quarter away from all of its keys and drops those left with
// none. So a key's weight is too low by the sum of all d at most, and never too high. Every purge takes d from three
// quarters of a table's keys or more, hence the sum is at most (weight added to the table) / (3/4 of its keys).
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "common/packed_sequences.h"

namespace hmi {

struct KeyWeight {
  int64_t key;
  double weight;
};

// A second array of slots for rebuilding a table, which all tables of a sketch share: one is rebuilt at a time.
struct SpareSlots {
  mutable std::mutex mutex;
  std::vector<KeyWeight> slots;
};

// One shard: an open-addressing table from key to weight that grows up to a limit. Key 0 marks an empty slot.
class WeightTable {
 public:
  explicit WeightTable(int64_t max_items);

  void prefetch(int64_t key) const { __builtin_prefetch(&slots_[home(key)], 1); }
  void add(int64_t key, double weight, SpareSlots& spare);
  void scale(double factor);
  void append_items(double min_weight, std::vector<KeyWeight>& items) const;
  // All of them, neighbours far apart: in the order of their slots they would crowd the front of a table that grows.
  void append_scattered(std::vector<KeyWeight>& items) const;

  int64_t size() const { return size_; }
  int64_t memory_bytes() const { return static_cast<int64_t>(slots_.capacity() * sizeof(KeyWeight)); }
  static int64_t slots_for(int64_t items) { return items + items / 3 + 1; }  // at most three quarters full

  double total = 0;   // weight added
  double offset = 0;  // no key's weight is too low by more

 private:
  size_t home(int64_t key) const;
  KeyWeight& locate(int64_t key);
  void make_room(SpareSlots& spare);
  double low_quantile(std::vector<KeyWeight>& scratch) const;
  void rebuild(int64_t limit, double subtracted, std::vector<KeyWeight>& spare);

  int64_t max_items_;
  int64_t limit_;  // keys that the slots are for now
  int64_t size_ = 0;
  std::vector<KeyWeight> slots_;
};

// Every function may be called from several threads at once: each shard of the keys has a table and a mutex. While
// others add, a result that spans shards (items, total, size, a merge) takes each shard at a moment of its own.
class FrequencySketch {
 public:
  // Throws std::invalid_argument unless max_items is positive.
  explicit FrequencySketch(int64_t max_items);

  // Key 0 is skipped. Throws std::invalid_argument, and adds nothing, on a negative key or a weight that is not
  // positive and finite.
  void add(const int64_t* keys, int64_t count, double weight);
  // Adds what a PLOT lookup of the given sequences (numbers; each is added as often as it is given) asks for. Window 2:
  // every two neighbours, in slots 0 and 1. Window 3: every three, and every two in slots 0, 1 and in slots 1, 2, which
  // a missing window is composed of. Throws std::invalid_argument, and adds nothing, on bad arguments.
  void add_windows(const PackedSequences& sequences, const int64_t* numbers, int64_t num_numbers, int window,
                   double weight);
  // Adds another sketch, of any size: totals and error bounds add up.
  void merge(const FrequencySketch& other);
  // Multiplies all weights, the total and the error bound. Throws std::invalid_argument unless the factor is positive
  // and finite.
  void scale(double factor);
  void clear();

  // Those of at least min_weight, by ascending key.
  std::vector<KeyWeight> items(double min_weight) const;
  int64_t size() const;
  double total() const;
  double max_error() const;
  int64_t memory_bytes() const;
  int64_t max_items() const { return max_items_; }
  static int64_t max_memory_bytes(int64_t max_items);

 private:
  struct Shard {
    explicit Shard(int64_t max_items) : table(max_items) {}
    mutable std::mutex mutex;
    WeightTable table;
  };

  struct TableCopy {
    double total;
    double offset;
    std::vector<KeyWeight> items;
  };

  size_t shard_of(int64_t key) const;
  void add_by_shard(const std::vector<int64_t>& keys, double weight);
  TableCopy copy_table(size_t shard) const;
  // body(table) for every shard in turn, under its mutex.
  template <class Body>
  void for_each_table(const Body& body) const;

  int64_t max_items_;
  SpareSlots spare_;
  std::vector<std::unique_ptr<Shard>> shards_;  // a power of two
};

}  // namespace hmi
