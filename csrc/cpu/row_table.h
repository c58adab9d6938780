// A table of rows of the PLOT in one of its formats, and how one row of it is read.
#pragma once

#include <cstdint>

#include "common/data_type.h"
#include "cpu/simd/simd_kernels.h"

namespace hmi {

struct RowTable {
  const void* data;
  int64_t num_rows;
  DataType type;        // kFloat32, kFloat16, kInt8 or kCode
  const float* scales;  // [num_rows, slots] for int8: a row is scale * int8, with a scale for each slot; else null
  // For kCode halves [slots, hidden_size / piece_size, 256, piece_size]: code m of a slot tells which of 256 pieces
  // stands at elements m * piece_size and on; a row then has hidden_size / piece_size codes a slot. Else null.
  const uint16_t* codebooks;
  int piece_size;  // 4 or 8
};

inline int64_t row_bytes(DataType type, int piece_size, int64_t hidden_size) {
  switch (type) {
    case DataType::kFloat32:
      return hidden_size * 4;
    case DataType::kInt8:
      return hidden_size;
    case DataType::kCode:
      return hidden_size / piece_size;
    default:
      return hidden_size * 2;
  }
}

// Slot `slot` of a row; `index` counts the slots of all rows.
inline MergeSource row_source(const RowTable& table, int64_t index, int slot, int64_t hidden_size) {
  const char* row = static_cast<const char*>(table.data) + index * row_bytes(table.type, table.piece_size, hidden_size);
  const float scale = table.scales == nullptr ? 1.0f : table.scales[index];
  const uint16_t* codebook =
      table.codebooks == nullptr ? nullptr : table.codebooks + slot * hidden_size * kCodebookSize;
  return {row, table.type, scale, codebook, table.piece_size};
}

}  // namespace hmi
