// From offsets of code in this module to places in the kernels' source.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

// "file:line" of each instruction: where the kernel's code calls the emulator, if it is the emulator's own. Offsets as
// code_offset() gives them for return addresses. "?" where addr2line knows no place.
std::vector<std::string> places_of(const std::vector<uint32_t>& codes);
// The function that begins at the offset, with its template arguments.
std::string function_at(uint32_t code);

}  // namespace emulator
