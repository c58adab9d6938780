#include "emulator/global_memory.h"

#include <cstdint>
#include <cstring>
#include <string>

#include "emulator/machine.h"
#include "emulator/memory_access.h"

namespace emulator {
namespace {

void require_aligned(const void* address, std::size_t bytes, const Place& place) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  fail("access of " + std::to_string(bytes) + " bytes at " + text(place) + ": the address is not a multiple of that");
}

template <class Value>
Value load(const void* address, AccessKind kind, const Place& place, const void* program_counter) {
  const Unobserved unobserved;
  require_aligned(address, sizeof(Value), place);
  observe(address, sizeof(Value), kind, program_counter);
  Value value;
  std::memcpy(&value, address, sizeof value);
  return value;
}

}  // namespace

uint4 load16_constant(const void* address, Place place) {
  return load<uint4>(address, AccessKind::kConstantRead, place, __builtin_return_address(0));
}

uint2 load8_constant(const void* address, Place place) {
  return load<uint2>(address, AccessKind::kConstantRead, place, __builtin_return_address(0));
}

unsigned load4_constant(const void* address, Place place) {
  return load<unsigned>(address, AccessKind::kConstantRead, place, __builtin_return_address(0));
}

unsigned char load1_constant(const void* address, Place place) {
  return load<unsigned char>(address, AccessKind::kConstantRead, place, __builtin_return_address(0));
}

uint4 load16(const void* address, Place place) {
  return load<uint4>(address, AccessKind::kRead, place, __builtin_return_address(0));
}

void store16(void* address, const uint4& value, Place place) {
  const Unobserved unobserved;
  require_aligned(address, sizeof value, place);
  observe(address, sizeof value, AccessKind::kWrite, __builtin_return_address(0));
  std::memcpy(address, &value, sizeof value);
}

}  // namespace emulator
