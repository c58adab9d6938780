#include "common/segments.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

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

void check_matrix_size(const char* name, int64_t slot, int64_t size, int64_t most, int64_t multiple) {
  if (size < 0 || size > most) refuse(name, slot, size, ", not 0.." + std::to_string(most));
  if (size % multiple != 0) {
    refuse(name, slot, size, ", but this backend takes multiples of " + std::to_string(multiple));
  }
}

void check_matrix(const MatrixTable& table, int64_t slot) {
  check_matrix_size("slot_rows", slot, table.rows[slot], table.max_rows, table.multiple);
  check_matrix_size("slot_columns", slot, table.columns[slot], table.max_columns, table.multiple);
  if (!table.has(slot)) return;
  const int64_t size = int64_t{table.rows[slot]} * table.columns[slot], offset = table.offsets[slot];
  if (offset < 0 || offset > table.arena_size - size) {
    refuse("slot_offsets", slot, offset, ", but its matrix of " + std::to_string(size) +
                                             " elements does not fit into the arena of " +
                                             std::to_string(table.arena_size));
  }
  if (offset % table.multiple != 0) {
    refuse("slot_offsets", slot, offset, ", but this backend takes multiples of " + std::to_string(table.multiple));
  }
}

void check_disjoint(const Segments& s, const MatrixTable& table) {
  std::vector<int64_t> slots;
  for (int64_t g = 0; g < s.count; ++g) {
    if (table.has(s.slots[g])) slots.push_back(s.slots[g]);
  }
  std::sort(slots.begin(), slots.end());
  slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
  std::sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) { return table.offsets[a] < table.offsets[b]; });
  for (size_t i = 1; i < slots.size(); ++i) {
    const int64_t before = slots[i - 1], slot = slots[i];
    if (table.offsets[slot] < table.offsets[before] + int64_t{table.rows[before]} * table.columns[before]) {
      refuse("slot_offsets", slot, table.offsets[slot], ", within the matrix of slot " + std::to_string(before) +
                                                            ": gradients of matrices that overlap cannot be told apart");
    }
  }
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

void check_matrices(const Segments& s, const MatrixTable& table, bool must_be_disjoint) {
  for (int64_t g = 0; g < s.count; ++g) {
    if (s.slots[g] >= 0) check_matrix(table, s.slots[g]);
  }
  if (must_be_disjoint) check_disjoint(s, table);
}

}  // namespace hmi
