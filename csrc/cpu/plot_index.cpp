#include "cpu/plot_index.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/parallel.h"

namespace hmi {
namespace {

// Slots are fetched this many keys ahead: enough to cover a miss of the last-level cache.
constexpr int64_t kPrefetchDistance = 16;
constexpr int64_t kKeysPerTask = 4096;

void check_keys(const int64_t* keys, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (keys[i] <= 0) {
      throw std::invalid_argument("keys[" + std::to_string(i) + "] is " + std::to_string(keys[i]) +
                                  ", but n-gram keys are positive");
    }
  }
}

void check_rows(const int64_t* rows, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (rows[i] < 0) {
      throw std::invalid_argument("rows[" + std::to_string(i) + "] is " + std::to_string(rows[i]) +
                                  ", but rows are not negative");
    }
  }
}

}  // namespace

PlotIndex::PlotIndex(IndexSlot* slots, int64_t capacity) : slots_(slots), capacity_(capacity), shift_(64) {
  if (capacity < 2 || (capacity & (capacity - 1)) != 0) {
    throw std::invalid_argument("index must have a power of two of slots, at least 2, not " +
                                std::to_string(capacity));
  }
  for (int64_t size = capacity; size > 1; size >>= 1) --shift_;
}

int64_t PlotIndex::capacity_for(int64_t count) {
  int64_t capacity = 2;
  while (capacity < 2 * count) capacity *= 2;
  return capacity;
}

int64_t PlotIndex::count_used() const {
  return std::count_if(slots_, slots_ + capacity_, [](const IndexSlot& slot) { return slot.key != 0; });
}

void PlotIndex::build(const int64_t* keys, int64_t count) {
  check_keys(keys, count);
  for (int64_t i = 0; i < count; ++i) {
    if (i + kPrefetchDistance < count) __builtin_prefetch(home(keys[i + kPrefetchDistance]), 1);
    IndexSlot& slot = slots_[locate(keys[i])];
    if (slot.key == keys[i]) {
      throw std::invalid_argument("keys[" + std::to_string(i) + "] and keys[" + std::to_string(slot.row) +
                                  "] are both " + std::to_string(keys[i]) + ", but keys must be distinct");
    }
    slot = {keys[i], i};
  }
}

void PlotIndex::insert(const int64_t* keys, const int64_t* rows, int64_t count) {
  check_keys(keys, count);
  check_rows(rows, count);
  std::vector<int64_t> added;
  for (int64_t i = 0; i < count; ++i) {
    if (find(keys[i]) == kMissing) added.push_back(keys[i]);
  }
  std::sort(added.begin(), added.end());
  const int64_t num_added = std::unique(added.begin(), added.end()) - added.begin();
  const int64_t num_used = count_used();
  if (2 * (num_used + num_added) > capacity_) {
    throw std::invalid_argument("index of " + std::to_string(capacity_) + " slots holds " + std::to_string(num_used) +
                                " keys and cannot take " + std::to_string(num_added) +
                                " more: at most half may be used. Build a larger one");
  }
  for (int64_t i = 0; i < count; ++i) publish(slots_[locate(keys[i])], keys[i], rows[i]);
}

void plot_index_find(const PlotIndex& index, const int64_t* keys, int64_t* rows, int64_t count, int num_threads) {
  const int64_t num_tasks = (count + kKeysPerTask - 1) / kKeysPerTask;
  parallel_for(threads_for(num_threads, num_tasks, 1), num_tasks, [=, &index](int64_t task, int) noexcept {
    const int64_t end = std::min(count, (task + 1) * kKeysPerTask);
    for (int64_t i = task * kKeysPerTask; i < end; ++i) {
      if (i + kPrefetchDistance < end) __builtin_prefetch(index.home(keys[i + kPrefetchDistance]));
      // 0 marks an empty slot: it is never found, whatever a caller asks for.
      rows[i] = keys[i] > 0 ? index.find(keys[i]) : kMissing;
    }
  });
}

}  // namespace hmi
