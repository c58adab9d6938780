// Where in the kernels' source a primitive is used.
#pragma once

#include <string>

namespace emulator {

// As a default argument, Place::here() is the place of the caller.
struct Place {
  const char* file = "";
  int line = 0;

  static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// "file:line", as short_path.
std::string text(const Place& place);
// The path without the folders above csrc and tests.
std::string short_path(const std::string& path);

}  // namespace emulator

// Keeps the compiler from reporting the memory accesses of a function to the checks (see memory_access.h).
#define EMULATOR_UNOBSERVED __attribute__((no_sanitize("thread")))
