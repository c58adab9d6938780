#include "common/read_files.h"

#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "common/thread_pool.h"

namespace hmi {
namespace {

// A piece stays in the second-level cache until its values have been looked at.
constexpr int64_t kPieceBytes = 128 << 10;
// Threads are woken only for as much as takes longer than waking them.
constexpr int64_t kBytesWorthAThread = 256 << 10;
constexpr uint32_t kExponent = 0x7f800000;

std::atomic<ThreadPool*> pool{nullptr};

// A pool of its own: who waits for a disk must not hold up the kernels. After fork() its threads are gone.
ThreadPool& reading_pool() {
  static const bool created = [] {
    pool.store(new ThreadPool);
    pthread_atfork(nullptr, nullptr, [] { pool.store(new ThreadPool); });
    return true;
  }();
  (void)created;
  return *pool.load();
}

bool all_finite(const char* bytes, int64_t size) {
  uint32_t bad = 0;
  for (int64_t i = 0; i + 4 <= size; i += 4) {
    uint32_t bits;
    std::memcpy(&bits, bytes + i, sizeof bits);
    bad |= static_cast<uint32_t>((bits & kExponent) == kExponent);
  }
  return bad == 0;
}

void read_open(int descriptor, const FileRead& read, bool check_finite, FileReadOutcome& outcome) noexcept {
  int64_t checked = 0;
  while (outcome.bytes_read < read.size) {
    const int64_t wanted = check_finite ? std::min(kPieceBytes, read.size - outcome.bytes_read)
                                        : read.size - outcome.bytes_read;
    const ssize_t count = pread(descriptor, read.destination + outcome.bytes_read, static_cast<size_t>(wanted),
                                read.offset + outcome.bytes_read);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) outcome.error = errno;
    if (count <= 0) return;
    outcome.bytes_read += count;
    if (check_finite) {
      const int64_t whole = outcome.bytes_read / 4 * 4;
      outcome.is_finite &= all_finite(read.destination + checked, whole - checked);
      checked = whole;
    }
  }
}

FileReadOutcome read_file(const FileRead& read, bool check_finite) noexcept {
  FileReadOutcome outcome;
  const int descriptor = open(read.path.c_str(), O_RDONLY | O_CLOEXEC);
  if (descriptor < 0) {
    outcome.error = errno;
    return outcome;
  }
  read_open(descriptor, read, check_finite, outcome);
  close(descriptor);
  return outcome;
}

}  // namespace

std::vector<FileReadOutcome> read_files(const std::vector<FileRead>& reads, bool check_finite, int num_threads) {
  int64_t total = 0;
  for (const FileRead& read : reads) {
    if (read.offset < 0 || read.size < 0) throw std::invalid_argument(read.path + ": offset and size must not be negative");
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
