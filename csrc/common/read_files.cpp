#include "common/read_files.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common/thread_pool.h"

namespace hmi {
namespace {

// Threads are woken only for as much as takes longer than waking them.
constexpr int64_t kBytesWorthAThread = 256 << 10;

std::atomic<ThreadPool*> pool{nullptr};

// A pool of its own: who waits for a disk must not hold up the kernels. Its threads are woken all at once, beside the
// caller, which for files in the page cache is faster than a ReaderPool. After fork() they are gone.
ThreadPool& reading_pool() {
  static const bool created = [] {
    pool.store(new ThreadPool);
    pthread_atfork(nullptr, nullptr, [] { pool.store(new ThreadPool); });
    return true;
  }();
  (void)created;
  return *pool.load();
}

}  // namespace

std::vector<FileReadOutcome> read_files(const std::vector<FileRead>& reads, bool check_finite, int num_threads) {
  int64_t total = 0;
  for (const FileRead& read : reads) {
    read.check();
    total += read.size;
  }
  std::vector<FileReadOutcome> outcomes(reads.size());
  std::atomic<size_t> next{0};
  const auto work = [&] {
    for (size_t i = next.fetch_add(1); i < reads.size(); i = next.fetch_add(1)) {
      outcomes[i] = read_file(reads[i], check_finite);
    }
  };
  const int64_t helpers = std::min<int64_t>(
      {num_threads - 1, static_cast<int64_t>(reads.size()) - 1, total / kBytesWorthAThread});
  if (helpers > 0) {
    reading_pool().run(static_cast<int>(helpers), work);
  } else {
    work();
  }
  return outcomes;
}

}  // namespace hmi
