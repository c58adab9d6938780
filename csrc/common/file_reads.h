// Files that are read one by one, by threads that join: those of a ReaderPool.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <vector>

#include "common/file_read.h"

namespace hmi {

enum class ReadStage { kWaiting, kUnderWay, kEnded };

struct ReadProgress {
  ReadStage stage = ReadStage::kWaiting;
  FileReadOutcome outcome;  // if it has ended; error ECANCELED if it never began
  double seconds = 0;       // that an ended read took, from its beginning to its end
};

// Thread-safe. Whoever makes one keeps the destinations apart, and in memory until is_done().
//
// After fork() the parent's reads go on in the parent alone: in the child, wait(), progress() and seconds() throw
// std::runtime_error, is_done() is true, and nothing waits for a lock that was held during fork().
class FileReads {
 public:
  // Throws std::invalid_argument on negative offsets and sizes, and unless num_threads is positive.
  FileReads(std::vector<FileRead> reads, bool check_finite, int num_threads);
  FileReads(const FileReads&) = delete;
  FileReads& operator=(const FileReads&) = delete;

  // For threads that read. join() gives the calling thread a place, which must then call read_on(): it reads one file
  // after the other until all have begun. There are num_threads places; a read that takes longer than a second does not
  // count, so that others go on beside it, however many are stuck.
  bool join();
  void read_on() noexcept;
  bool may_join() const;  // whether join() would give a place
  bool all_begun() const;

  // Returns whether all have ended, after so many seconds at the latest; infinity waits until they have.
  bool wait(double seconds) const;
  bool is_done() const;
  // Those that have not begun never will: they have ended. Those under way go on.
  void cancel();
  std::vector<ReadProgress> progress() const;
  // From the start to the end of the last read, of those that have ended so far.
  double seconds() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct UnderWay {
    size_t number;
    Clock::time_point began;
  };

  bool is_of_this_process() const;
  void require_this_process() const;
  bool has_places_for(size_t num_threads) const;
  void end(size_t number, const FileReadOutcome& outcome, Clock::time_point began);

  const std::vector<FileRead> reads_;
  const bool check_finite_;
  const size_t num_threads_;
  const int process_;
  const Clock::time_point started_;
  mutable std::mutex mutex_;  // guards what follows
  mutable std::condition_variable done_;
  std::vector<UnderWay> under_way_;
  std::vector<ReadProgress> progress_;
  size_t num_joined_ = 0;  // threads
  size_t num_begun_ = 0;   // reads; those after it wait
  size_t num_left_;        // reads that have not ended
  Clock::time_point last_end_;
};

}  // namespace hmi
