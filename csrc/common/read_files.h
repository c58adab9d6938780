// Many files read at once, each straight to where it is wanted.
#pragma once

#include <vector>

#include "common/file_read.h"

namespace hmi {

// Reads all of them, up to num_threads at a time, the caller's among them; one that fails harms no other. The caller
// keeps the destinations apart. Throws std::invalid_argument on negative numbers, before anything is read.
std::vector<FileReadOutcome> read_files(const std::vector<FileRead>& reads, bool check_finite, int num_threads);

}  // namespace hmi
