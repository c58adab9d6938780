// Every access of a kernel to memory, for the race check and the counters. In builds that observe, the compiler calls
// a function before each load and store (-fsanitize=thread, without its library); the primitives of cuda/device.cuh
// say theirs themselves.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

// kConstantRead: of memory that nobody writes during the launch. kMatrixRow: a row that ldmatrix reads.
enum class AccessKind : uint8_t { kRead, kConstantRead, kMatrixRow, kCopyRead, kWrite, kCopyWrite };

constexpr bool is_write(AccessKind kind) { return kind == AccessKind::kWrite || kind == AccessKind::kCopyWrite; }

struct Access {
  uintptr_t address;
  uint32_t bytes;
  AccessKind kind;
  bool shared;
  uint32_t code;  // offset in this module of the instruction
};

// Takes note of an access by the running thread, from the emulator's own code.
void observe(const void* address, std::size_t bytes, AccessKind kind, const void* program_counter);
// The same, where it must not be counted twice: only the race check hears of it.
void observe_race(const void* address, std::size_t bytes, AccessKind kind, const void* program_counter);

uint32_t code_offset(const void* program_counter);

}  // namespace emulator
