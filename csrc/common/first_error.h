// Keeps the lowest position at which parallel work met bad input, so that the message never depends on timing.
#pragma once

#include <atomic>
#include <cstdint>

namespace hmi {

class FirstError {
 public:
  void report(int64_t position) noexcept {
    int64_t seen = position_.load(std::memory_order_relaxed);
    while (position < seen && !position_.compare_exchange_weak(seen, position, std::memory_order_relaxed)) {
    }
  }
  bool any() const { return position() != INT64_MAX; }
  int64_t position() const { return position_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> position_{INT64_MAX};
};

}  // namespace hmi
