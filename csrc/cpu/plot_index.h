// The PLOT index: an open-addressing hash table from n-gram key to row, in one flat array that a file can hold.
//
// Format: capacity C (a power of two, at least 2) slots of (key, row), both int64, little-endian. An empty slot has key
// 0. A key's home slot is the top log2(C) bits of mix_key(key); it lies in the first slot from there on, cyclically,
// that held no other key when it was added. At most half of the slots are used.
//
// One thread may insert while others find: a slot's row is written before its key, so a key is found with its row or
// not at all.
#pragma once

#include <cstdint>

#include "common/ngram_key.h"

namespace hmi {

struct IndexSlot {
  int64_t key;
  int64_t row;
};

constexpr int64_t kMissing = -1;

class PlotIndex {
 public:
  // Throws std::invalid_argument if the capacity is not a power of two of at least 2.
  PlotIndex(IndexSlot* slots, int64_t capacity);

  const IndexSlot* home(int64_t key) const { return slots_ + (mix_key(key) >> shift_); }

  // The key's row, or kMissing. Ends even in a damaged index that has no empty slot.
  int64_t find(int64_t key) const {
    const IndexSlot* slot = slots_ + locate(key);
    return key_of(*slot) == key ? __atomic_load_n(&slot->row, __ATOMIC_RELAXED) : kMissing;
  }

  int64_t count_used() const;
  // Adds the keys with their rows, overwriting the row of a key that is there. Throws std::invalid_argument, and
  // changes nothing, if a key is not positive, a row is negative, or more than half of the slots would be used.
  void insert(const int64_t* keys, const int64_t* rows, int64_t count);
  // Fills an empty index: keys[i] gets row i. Throws std::invalid_argument on a key that is not positive or comes twice.
  void build(const int64_t* keys, int64_t count);

  static int64_t capacity_for(int64_t count);

 private:
  static int64_t key_of(const IndexSlot& slot) { return __atomic_load_n(&slot.key, __ATOMIC_ACQUIRE); }
  static void publish(IndexSlot& slot, int64_t key, int64_t row) {
    __atomic_store_n(&slot.row, row, __ATOMIC_RELAXED);
    __atomic_store_n(&slot.key, key, __ATOMIC_RELEASE);
  }

  // The slot that holds the key or, if it is missing, the empty slot where it belongs.
  int64_t locate(int64_t key) const {
    int64_t position = home(key) - slots_;
    for (int64_t probes = 0; probes < capacity_; ++probes) {
      const int64_t found = key_of(slots_[position]);
      if (found == key || found == 0) break;
      position = (position + 1) & (capacity_ - 1);
    }
    return position;
  }

  IndexSlot* slots_;
  int64_t capacity_;
  int shift_;
};

// rows[i] = the row of keys[i], or kMissing.
void plot_index_find(const PlotIndex& index, const int64_t* keys, int64_t* rows, int64_t count, int num_threads);

}  // namespace hmi
