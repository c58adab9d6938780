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

// Slots whose block is one matrix of rows[slot] x columns[slot] elements.
struct MatrixTable {
  const int64_t* offsets;  // in elements of the arena
  const int32_t* rows;     // 0 for nothing here
  const int32_t* columns;  // likewise
  int64_t arena_size;
  int64_t max_rows;
  int64_t max_columns;
  int64_t multiple;  // of offsets, rows and columns, as the kernel asks; 1 if it does not

  bool has(int64_t slot) const { return slot >= 0 && rows[slot] > 0 && columns[slot] > 0; }
};

// Throws std::invalid_argument unless the matrix of every slot that a segment names has at most max_rows and
// max_columns and lies in the arena; with must_be_disjoint also if two of them share an element.
void check_matrices(const Segments& segments, const MatrixTable& table, bool must_be_disjoint);

}  // namespace hmi
