// Many files read at once, each straight to where it is wanted.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hmi {

struct FileRead {
  std::string path;
  int64_t offset;  // of the first byte in the file
  int64_t size;
  char* destination;
};

struct FileReadOutcome {
  int error = 0;           // errno of the call that failed, or 0
  int64_t bytes_read = 0;  // fewer than asked for where the file ends early
  bool is_finite = true;   // looked at only where asked for, and only if all was read
};

// Reads all of them, up to num_threads at a time; one that fails harms no other. With check_finite the bytes are taken
// as float32, while the cache still holds them: is_finite says whether none is NaN or infinite. The caller keeps the
// destinations apart. Throws std::invalid_argument on negative numbers, before anything is read.
std::vector<FileReadOutcome> read_files(const std::vector<FileRead>& reads, bool check_finite, int num_threads);

}  // namespace hmi
