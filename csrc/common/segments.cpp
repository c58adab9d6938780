#include "common/segments.h"

#include <stdexcept>
#include <string>

#include "cpu/simd/simd_kernels.h"

namespace hmi {
namespace {

[[noreturn]] void refuse(const char* name, int64_t index, int64_t value, const std::string& why) {
  throw std::invalid_argument(std::string(name) + "[" + std::to_string(index) + "] is " + std::to_string(value) + why);
}

void check_rank(const SlotTable& table, int64_t slot) {
  const int64_t rank = table.ranks[slot];
  if (rank < 0 || rank > table.arena_size) refuse("slot_ranks", slot, rank, ", which no block of the arena can have");
  if (rank % table.multiple != 0 || rank > table.max_rank) {
    refuse("slot_ranks", slot, rank, ", but this backend takes multiples of " + std::to_string(table.multiple) +
                                         " up to " + std::to_string(table.max_rank));
  }
}

void check_offset(const SlotTable& table, int64_t slot, int64_t block_size) {
  const int64_t offset = table.offsets[slot];
  if (offset < 0 || offset > table.arena_size - block_size) {
    refuse("slot_offsets", slot, offset, ", but its block of " + std::to_string(block_size) +
                                             " elements does not fit into the arena of " +
                                             std::to_string(table.arena_size));
  }
  if (offset % table.multiple != 0) {
    refuse("slot_offsets", slot, offset, ", but this backend takes multiples of " + std::to_string(table.multiple));
  }
}

void check_slot(const SlotTable& table, int64_t slot) {
  if (table.ranks == nullptr) {
    if (table.offsets[slot] != -1) check_offset(table, slot, table.fixed);
    return;
  }
  check_rank(table, slot);
  if (table.ranks[slot] == 0) return;
  check_offset(table, slot, table.ranks[slot] * table.per_rank + table.fixed);
  if (table.activations == nullptr) return;
  const int32_t activation = table.activations[slot];
  if (activation < 0 || activation >= kNumActivations) refuse("slot_activations", slot, activation, ", not 0..4");
}

}  // namespace

void check_segments(const Segments& s) {
  for (int64_t g = 0; g <= s.count; ++g) {
    if (s.offsets[g] < (g == 0 ? 0 : s.offsets[g - 1]) || s.offsets[g] > s.num_tokens) {
      refuse("segment_offsets", g, s.offsets[g],
             ", but offsets must not decrease and lie in 0.." + std::to_string(s.num_tokens));
    }
  }
  for (int64_t g = 0; g < s.count; ++g) {
    if (s.slots[g] < -1 || s.slots[g] >= s.num_slots) {
      refuse("segment_slots", g, s.slots[g], ", but there are " + std::to_string(s.num_slots) + " slots");
    }
  }
}

void check_slots(const Segments& s, const SlotTable& table) {
  for (int64_t g = 0; g < s.count; ++g) {
    if (s.slots[g] >= 0) check_slot(table, s.slots[g]);
  }
}

}  // namespace hmi
