#include "emulator/async_copy.h"

#include <cstdint>
#include <cstring>
#include <utility>

#include "emulator/machine.h"
#include "emulator/memory_access.h"
#include "emulator/shared_memory.h"
#include "emulator/sites.h"

namespace emulator {
namespace {

constexpr std::size_t kBytes = 16;
constexpr int kUndefined = 0xff;

void carry_out(const AsyncCopy& copy) {
  if (copy.valid) {
    std::memcpy(copy.destination, copy.source, kBytes);
  } else {
    std::memset(copy.destination, 0, kBytes);
  }
}

bool takes_place_early() {
  if (machine.settings.copy_time == CopyTime::kRandom) return machine.random() % 2 == 0;
  return machine.settings.copy_time == CopyTime::kEarly;
}

void require_legal(const void* shared, const void* global, bool valid, const Place& place) {
  const auto misaligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % kBytes != 0; };
  if (misaligned(shared)) fail("cp.async at " + text(place) + ": the destination is not a multiple of 16 bytes");
  // Hardware wants it of a source that is not read, too.
  if (misaligned(global)) fail("cp.async at " + text(place) + ": the source is not a multiple of 16 bytes");
  if (!is_shared(shared, kBytes)) fail("cp.async at " + text(place) + ": the destination is not in shared memory");
  if (valid && is_shared(global, kBytes)) fail("cp.async at " + text(place) + ": the source is in shared memory");
}

// The copy touches memory at some time between its start and its end: the race check hears of it at both.
void finish(const AsyncCopy& copy) {
  if (!copy.done) carry_out(copy);
  observe_race(copy.destination, kBytes, AccessKind::kCopyWrite, copy.program_counter);
  if (copy.valid) observe_race(copy.source, kBytes, AccessKind::kCopyRead, copy.program_counter);
}

}  // namespace

void start_copy(void* shared, const void* global, bool valid, Place place) {
  const Unobserved unobserved;
  const void* const program_counter = __builtin_return_address(0);
  require_legal(shared, global, valid, place);
  observe(shared, kBytes, AccessKind::kCopyWrite, program_counter);
  if (valid) observe(global, kBytes, AccessKind::kCopyRead, program_counter);
  const AsyncCopy copy{shared, global, valid, takes_place_early(), program_counter};
  if (copy.done) {
    carry_out(copy);
  } else {
    std::memset(shared, kUndefined, kBytes);
  }
  current->open_copies.push_back(copy);
}

void commit_copies() {
  const Unobserved unobserved;
  current->copy_groups.push_back(std::exchange(current->open_copies, {}));
}

void wait_copies(int pending, Place place) {
  const Unobserved unobserved;
  // A wait that is dropped for a test still waits, for one group less: the mistake that is easiest to make.
  if (is_dropped("copy wait", place)) ++pending;
  auto& groups = current->copy_groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const AsyncCopy& copy : groups.front()) finish(copy);
    groups.erase(groups.begin());
  }
}

void require_no_copies() {
  bool any = !current->open_copies.empty();
  for (const auto& group : current->copy_groups) any = any || !group.empty();
  if (any) fail("a thread exits with cp.async copies that it has not waited for");
}

}  // namespace emulator
