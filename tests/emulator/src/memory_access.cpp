#include "emulator/memory_access.h"

#include "emulator/counters.h"
#include "emulator/machine.h"
#include "emulator/race_check.h"
#include "emulator/shared_memory.h"

// The ends of this module in memory, from the linker.
extern "C" {
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern const char _end[] __attribute__((visibility("hidden")));
}

namespace emulator {
namespace {

// Constants and tables of the module: hardware keeps them in the instructions or in constant memory.
bool lies_in_module(const void* address) { return address >= __ehdr_start && address < _end; }

void take_note(const void* address, std::size_t bytes, AccessKind kind, const void* program_counter, bool counted) {
  const Settings& settings = machine.settings;
  if (!settings.check_races && !settings.count_accesses) return;
  if (current->fiber.owns(address)) return;
  const bool shared = is_shared(address, 1);
  if (!shared && lies_in_module(address)) return;
  const Access access{reinterpret_cast<uintptr_t>(address), static_cast<uint32_t>(bytes), kind, shared,
                      code_offset(program_counter)};
  if (settings.check_races) check_race(access);
  if (settings.count_accesses && counted) count_access(access);
}

}  // namespace

uint32_t code_offset(const void* program_counter) {
  return static_cast<uint32_t>(static_cast<const char*>(program_counter) - __ehdr_start);
}

void observe(const void* address, std::size_t bytes, AccessKind kind, const void* program_counter) {
  take_note(address, bytes, kind, program_counter, true);
}

void observe_race(const void* address, std::size_t bytes, AccessKind kind, const void* program_counter) {
  take_note(address, bytes, kind, program_counter, false);
}

// A load or store of instrumented code.
static void observe_kernel(const void* address, std::size_t bytes, AccessKind kind, const void* program_counter) {
  if (!observing) return;
  const Unobserved unobserved;
  take_note(address, bytes, kind, program_counter, true);
}

}  // namespace emulator

// What code compiled with -fsanitize=thread calls; libtsan is not linked.
extern "C" {

#define EMULATOR_HOOK __attribute__((visibility("hidden")))
#define EMULATOR_HOOKS(name, bytes)                                                                             \
  EMULATOR_HOOK void __tsan_##name##read##bytes(void* address) {                                                \
    emulator::observe_kernel(address, bytes, emulator::AccessKind::kRead, __builtin_return_address(0));         \
  }                                                                                                             \
  EMULATOR_HOOK void __tsan_##name##write##bytes(void* address) {                                               \
    emulator::observe_kernel(address, bytes, emulator::AccessKind::kWrite, __builtin_return_address(0));        \
  }

EMULATOR_HOOKS(, 1)
EMULATOR_HOOKS(, 2)
EMULATOR_HOOKS(, 4)
EMULATOR_HOOKS(, 8)
EMULATOR_HOOKS(, 16)
EMULATOR_HOOKS(unaligned_, 2)
EMULATOR_HOOKS(unaligned_, 4)
EMULATOR_HOOKS(unaligned_, 8)
EMULATOR_HOOKS(unaligned_, 16)

EMULATOR_HOOK void __tsan_read_range(void* address, size_t bytes) {
  emulator::observe_kernel(address, bytes, emulator::AccessKind::kRead, __builtin_return_address(0));
}
EMULATOR_HOOK void __tsan_write_range(void* address, size_t bytes) {
  emulator::observe_kernel(address, bytes, emulator::AccessKind::kWrite, __builtin_return_address(0));
}

// The guards of local statics.
EMULATOR_HOOK unsigned char __tsan_atomic8_load(const volatile void* address, int) {
  return *static_cast<const volatile unsigned char*>(address);
}
EMULATOR_HOOK void __tsan_init() {}
EMULATOR_HOOK void __tsan_func_entry(void*) {}
EMULATOR_HOOK void __tsan_func_exit() {}
EMULATOR_HOOK void __tsan_vptr_update(void**, void*) {}
EMULATOR_HOOK void __tsan_vptr_read(void**) {}

}  // extern "C"
