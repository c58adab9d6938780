#include "common/file_read.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "common/read_latency.h"

namespace hmi {
namespace {

// A piece stays in the second-level cache until its values have been looked at.
constexpr int64_t kPieceBytes = 128 << 10;
constexpr uint32_t kExponent = 0x7f800000;

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

int open_to_read(const char* path) noexcept {
  int descriptor;
  do {
    descriptor = open(path, O_RDONLY | O_CLOEXEC);
  } while (descriptor < 0 && errno == EINTR);  // where it waits, for a server or a pipe's other end
  return descriptor;
}

}  // namespace

void FileRead::check() const {
  if (offset < 0 || size < 0) throw std::invalid_argument(path + ": offset and size must not be negative");
}

FileReadOutcome read_file(const FileRead& read, bool check_finite) noexcept {
  FileReadOutcome outcome;
  const int descriptor = open_to_read(read.path.c_str());
  if (descriptor < 0) {
    outcome.error = errno;
  } else {
    read_open(descriptor, read, check_finite, outcome);
    close(descriptor);
  }
  sleep_as_slower_disk(outcome.bytes_read);
  return outcome;
}

}  // namespace hmi
