// A small pool of threads that sleep when idle.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>

namespace hmi {

class ThreadPool {
 public:
  // Runs entry() on the calling thread and on up to num_helpers sleeping ones, and returns when all have left it.
  // entry() must share the work out itself and return when none is left: it may run on fewer threads. Helpers that have
  // not woken by the time the caller is done are not waited for; while another region is running, or where the system
  // grants no more threads, the caller works alone.
  void run(int num_helpers, const std::function<void()>& entry);

 private:
  int start_helpers(int wanted);
  void helper_loop(int index);
  void wait_for_helpers();

  std::mutex region_mutex_;  // held for a whole region: one at a time
  std::mutex mutex_;         // guards what follows
  std::condition_variable wake_;
  std::condition_variable done_;
  const std::function<void()>* entry_ = nullptr;  // null between regions
  uint64_t region_ = 0;  // counts regions, so that a helper never runs one twice
  int num_invited_ = 0;  // helpers with a smaller index may take part in this region
  int num_helpers_ = 0;  // started so far; they live as long as the process
  std::atomic<int> num_inside_{0};  // helpers that are running entry_
};

}  // namespace hmi
