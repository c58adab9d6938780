// One file's bytes, read straight to where they are wanted.
#pragma once

#include <cstdint>
#include <string>

namespace hmi {

struct FileRead {
  std::string path;
  int64_t offset;  // of the first byte in the file
  int64_t size;
  char* destination;

  void check() const;  // throws std::invalid_argument on negative numbers
};

struct FileReadOutcome {
  int error = 0;           // errno of the call that failed, or 0
  int64_t bytes_read = 0;  // fewer than asked for where the file ends early
  bool is_finite = true;   // looked at only where asked for, and only if all was read
};

// With check_finite the bytes are taken as float32, while the cache still holds them: is_finite says whether none is
// NaN or infinite.
FileReadOutcome read_file(const FileRead& read, bool check_finite) noexcept;

}  // namespace hmi
