#include "common/thread_pool.h"

#include <system_error>

namespace hmi {
namespace {

// Long enough for a helper to finish a balanced share (some microseconds), too short to matter to anybody else.
constexpr int kSpinsBeforeSleeping = 2000;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void ThreadPool::run(int num_helpers, const std::function<void()>& entry) {
  std::unique_lock<std::mutex> region(region_mutex_, std::try_to_lock);
  if (!region.owns_lock() || (num_helpers = start_helpers(num_helpers)) == 0) return entry();
  {
    std::lock_guard<std::mutex> lock(mutex_);
    entry_ = &entry;
    num_invited_ = num_helpers;
    ++region_;
  }
  wake_.notify_all();
  entry();
  wait_for_helpers();
}

int ThreadPool::start_helpers(int wanted) {
  try {
    for (; num_helpers_ < wanted; ++num_helpers_) {
      std::thread(&ThreadPool::helper_loop, this, num_helpers_).detach();
    }
  } catch (const std::system_error&) {  // the system's limit of threads: work with those we have
  }
  return num_helpers_ < wanted ? num_helpers_ : wanted;
}

void ThreadPool::helper_loop(int index) {
  std::unique_lock<std::mutex> lock(mutex_);
  for (uint64_t seen = 0;; seen = region_) {
    wake_.wait(lock, [&] { return region_ != seen; });
    if (entry_ == nullptr || index >= num_invited_) continue;
    const std::function<void()>* entry = entry_;
    num_inside_.fetch_add(1, std::memory_order_relaxed);
    lock.unlock();
    (*entry)();
    lock.lock();
    if (num_inside_.fetch_sub(1, std::memory_order_release) == 1) done_.notify_one();
  }
}

void ThreadPool::wait_for_helpers() {
  std::unique_lock<std::mutex> lock(mutex_);
  entry_ = nullptr;  // whoever has not come yet finds the door closed
  lock.unlock();
  for (int i = 0; i < kSpinsBeforeSleeping; ++i) {
    if (num_inside_.load(std::memory_order_acquire) == 0) return;
    pause_briefly();
  }
  lock.lock();
  done_.wait(lock, [&] { return num_inside_.load(std::memory_order_acquire) == 0; });
}

}  // namespace hmi
