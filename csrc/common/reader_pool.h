// Threads that read files, and sleep while there are none to be read.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>

#include "common/file_reads.h"

namespace hmi {

// Never destroyed, and its threads are detached: a process ends without waiting for a read that is stuck.
class ReaderPool {
 public:
  // A thread is started whenever one is wanted and none is free, and lives as long as the process. A read that is stuck
  // costs one of these; when all of them are stuck, other reads wait.
  static constexpr int kMaxThreads = 256;

  // Reads those that have not begun, as many at a time as `reads` allows. Older ones first, where threads are lacking.
  // Returns false, having done nothing, if the system grants not even one thread.
  bool submit(std::shared_ptr<FileReads> reads);

 private:
  void read_loop() noexcept;
  std::shared_ptr<FileReads> join_any();
  void call_another();
  void start_thread();
  void rest(std::unique_lock<std::mutex>& lock);

  std::mutex mutex_;  // guards what follows
  std::condition_variable wake_;
  std::deque<std::shared_ptr<FileReads>> queue_;  // those of which reads have not begun
  int num_threads_ = 0;
  int num_idle_ = 0;         // threads in rest()
  bool is_called_ = false;   // a thread was woken or started, and is not there yet
  bool is_watched_ = false;  // an idle thread looks from time to time whether a read is stuck, and another may begin
};

// The process' own. After fork() the child has a new one, without threads.
ReaderPool& reader_pool();

}  // namespace hmi
