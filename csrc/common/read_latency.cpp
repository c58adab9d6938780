#include "common/read_latency.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace hmi {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kLongestSeconds = 1e6;  // of one transfer: the sum of many still fits the clock

struct Disk {
  float seconds_per_read;
  float seconds_per_byte;
};

// Both numbers change together, without a lock that fork() could leave locked.
std::atomic<Disk> simulated{Disk{0, 0}};
static_assert(std::atomic<Disk>::is_always_lock_free);
// When the disk has delivered all that it was asked for so far.
std::atomic<Clock::rep> free_at{0};

Clock::duration duration_of(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

Clock::rep reserve(Clock::rep transfer) noexcept {
  const Clock::rep now = Clock::now().time_since_epoch().count();
  Clock::rep seen = free_at.load(std::memory_order_relaxed);
  while (!free_at.compare_exchange_weak(seen, std::max(seen, now) + transfer, std::memory_order_relaxed)) {
  }
  return std::max(seen, now) + transfer;
}

}  // namespace

void set_read_latency(double seconds_per_read, double bytes_per_second) {
  if (!(seconds_per_read >= 0 && seconds_per_read <= 3600)) {
    throw std::invalid_argument("seconds_per_read must lie in 0..3600, not be " + std::to_string(seconds_per_read));
  }
  if (!(bytes_per_second >= 1)) {
    throw std::invalid_argument("bytes_per_second must be 1 or more, not " + std::to_string(bytes_per_second));
  }
  simulated.store({static_cast<float>(seconds_per_read), static_cast<float>(1 / bytes_per_second)});
  free_at.store(0);  // another disk, which nobody has asked for anything yet
}

void sleep_as_slower_disk(int64_t bytes) noexcept {
  const Disk disk = simulated.load(std::memory_order_relaxed);
  if (disk.seconds_per_read == 0 && disk.seconds_per_byte == 0) return;
  const double seconds = std::min(kLongestSeconds, static_cast<double>(bytes) * disk.seconds_per_byte);
  const Clock::duration delivered(reserve(duration_of(seconds).count()));
  std::this_thread::sleep_until(Clock::time_point(delivered + duration_of(disk.seconds_per_read)));
}

}  // namespace hmi
