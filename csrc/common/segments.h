// Segments of a batch, each with the slot of its adapter; the one check of their values on the host.
#pragma once

#include <cstdint>

namespace hmi {

struct Segments {
  const int64_t* offsets;  // [count + 1], over tokens
  const int32_t* slots;    // [count], -1 for no adapter
  int64_t count;
  int64_t num_tokens;
  int64_t num_slots;
};

// Throws std::invalid_argument, naming the argument, unless offsets rise within 0..num_tokens and slots lie in
// -1..num_slots - 1.
void check_segments(const Segments& segments);

// What a slot table says; the elements that a block of rank r takes are r * per_rank + fixed.
struct SlotTable {
  const int64_t* offsets;      // in elements of the arena
  const int32_t* ranks;        // 0 for nothing here; null for blocks without a rank, whose offset -1 says nothing here
  const int32_t* activations;  // may be null
  int64_t arena_size;
  int64_t per_rank;
  int64_t fixed;
  // What the kernel asks for beyond that: 1 and the arena's size if nothing.
  int64_t multiple;  // of ranks and offsets
  int64_t max_rank;
};

// Throws std::invalid_argument unless the block of every slot that a segment names lies in the arena.
void check_slots(const Segments& segments, const SlotTable& table);

}  // namespace hmi
