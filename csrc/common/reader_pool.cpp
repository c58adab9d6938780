#include "common/reader_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

namespace hmi {
namespace {

constexpr std::chrono::milliseconds kWatchInterval{250};

std::atomic<ReaderPool*> pool{nullptr};

}  // namespace

ReaderPool& reader_pool() {
  static const bool created = [] {
    pool.store(new ReaderPool);
    // The old one is abandoned with its lost threads and locks.
    pthread_atfork(nullptr, nullptr, [] { pool.store(new ReaderPool); });
    return true;
  }();
  (void)created;
  return *pool.load();
}

bool ReaderPool::submit(std::shared_ptr<FileReads> reads) {
  if (reads->all_begun()) return true;
  const std::lock_guard<std::mutex> lock(mutex_);
  queue_.push_back(std::move(reads));
  call_another();
  if (num_threads_ > 0) return true;
  queue_.pop_back();
  return false;
}

// Threads call each other, one at a time: whoever submits does not wait for that, and what one thread has read before a
// second is there needs no second. Where no place is free but reads wait, one thread still must watch.
void ReaderPool::call_another() {
  if (queue_.empty() || is_called_) return;
  if (num_idle_ == 0) return start_thread();
  const auto may_join = [](const std::shared_ptr<FileReads>& reads) { return reads->may_join(); };
  if (is_watched_ && std::none_of(queue_.begin(), queue_.end(), may_join)) return;
  is_called_ = true;
  wake_.notify_one();
}

void ReaderPool::start_thread() {
  if (num_threads_ == kMaxThreads) return;
  try {
    std::thread(&ReaderPool::read_loop, this).detach();
    ++num_threads_;
    is_called_ = true;
  } catch (const std::exception&) {  // the system's limit of threads, or of memory: go on with those there are
  }
}

void ReaderPool::read_loop() noexcept {
  std::unique_lock<std::mutex> lock(mutex_);
  is_called_ = false;
  for (;;) {
    if (std::shared_ptr<FileReads> reads = join_any()) {
      call_another();
      lock.unlock();
      reads->read_on();
      reads.reset();
      lock.lock();
    } else {
      rest(lock);
    }
  }
}

std::shared_ptr<FileReads> ReaderPool::join_any() {
  for (auto entry = queue_.begin(); entry != queue_.end();) {
    if ((*entry)->join()) return *entry;
    entry = (*entry)->all_begun() ? queue_.erase(entry) : entry + 1;
  }
  return nullptr;
}

void ReaderPool::rest(std::unique_lock<std::mutex>& lock) {
  ++num_idle_;
  if (queue_.empty() || is_watched_) {
    wake_.wait(lock);
  } else {
    is_watched_ = true;
    wake_.wait_for(lock, kWatchInterval);
    is_watched_ = false;
  }
  --num_idle_;
  is_called_ = false;
}

}  // namespace hmi
