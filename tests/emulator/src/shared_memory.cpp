#include "emulator/shared_memory.h"

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "emulator/machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {
namespace {

constexpr int kUndefined = 0xff;  // NaN in every floating type, -1 in every integer
constexpr int kGuard = 0xa5;
constexpr std::size_t kGuardBytes = 1024;
constexpr std::size_t kStaticLimit = 48 << 10;

struct StaticArray {
  unsigned char* address;
  std::size_t bytes;
  uint64_t block;  // the last that used it
};

unsigned char* dynamic_memory = nullptr;
std::size_t dynamic_bytes = 0;
std::vector<StaticArray> arrays;  // of this launch
std::size_t static_bytes = 0;

bool lies_in(const void* address, std::size_t bytes, const unsigned char* begin, std::size_t size) {
  const auto* first = static_cast<const unsigned char*>(address);
  return first >= begin && first + bytes <= begin + size;
}

void poison_guard([[maybe_unused]] bool on) {
#if defined(__SANITIZE_ADDRESS__)
  (on ? __asan_poison_memory_region : __asan_unpoison_memory_region)(dynamic_memory + dynamic_bytes, kGuardBytes);
#endif
}

}  // namespace

unsigned char* dynamic_shared() {
  const Unobserved unobserved;
  return dynamic_memory;
}

bool is_dynamic_shared(const void* address) { return lies_in(address, 1, dynamic_memory, dynamic_bytes); }

bool is_shared(const void* address, std::size_t bytes) {
  if (lies_in(address, bytes, dynamic_memory, dynamic_bytes)) return true;
  for (const StaticArray& array : arrays) {
    if (lies_in(address, bytes, array.address, array.bytes)) return true;
  }
  return false;
}

void begin_launch_shared(std::size_t bytes) {
  const std::size_t rounded = (bytes + kGuardBytes + 1023) / 1024 * 1024;
  dynamic_memory = static_cast<unsigned char*>(std::aligned_alloc(1024, rounded));
  if (dynamic_memory == nullptr) throw std::bad_alloc();
  dynamic_bytes = bytes;
  std::memset(dynamic_memory + dynamic_bytes, kGuard, kGuardBytes);
  poison_guard(true);
  arrays.clear();
  static_bytes = 0;
}

void begin_block_shared() { std::memset(dynamic_memory, kUndefined, dynamic_bytes); }

void end_block_shared() {
  poison_guard(false);
  for (std::size_t i = 0; i < kGuardBytes && machine.error.empty(); ++i) {
    if (dynamic_memory[dynamic_bytes + i] == kGuard) continue;
    machine.error = "the kernel wrote " + std::to_string(i) + " bytes past its " + std::to_string(dynamic_bytes) +
                    " bytes of dynamic shared memory";
  }
  poison_guard(true);
}

void end_launch_shared() {
  poison_guard(false);
  std::free(dynamic_memory);
  dynamic_memory = nullptr;
  dynamic_bytes = 0;
  arrays.clear();
}

void use_static_shared(void* address, std::size_t bytes) {
  const Unobserved unobserved;
  StaticArray* array = nullptr;
  for (StaticArray& known : arrays) {
    if (known.address == address) array = &known;
  }
  if (array == nullptr) {
    static_bytes += bytes;
    if (static_bytes > kStaticLimit) {
      fail(std::to_string(static_bytes) + " bytes of static shared memory, above 48 KiB");
    }
    arrays.push_back({static_cast<unsigned char*>(address), bytes, 0});
    array = &arrays.back();
  }
  if (array->block == machine.blocks_begun) return;
  array->block = machine.blocks_begun;
  std::memset(address, kUndefined, bytes);
}

}  // namespace emulator
