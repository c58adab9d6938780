// Tables of rows, of the PLOT and of its unigrams, as Python describes them.
#pragma once

#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "cpu/plot_index.h"
#include "cpu/row_table.h"

namespace hmi::bindings {

// (address, rows, number of its DataType, address of its scales or 0, of its codebooks or 0, elements of their pieces)
using NumberedTable = std::tuple<Address, int64_t, int, Address, Address, int>;

inline std::vector<hmi::RowTable> row_tables(const std::vector<NumberedTable>& tables) {
  std::vector<hmi::RowTable> converted;
  for (const auto& [address, num_rows, type, scales, codebooks, piece_size] : tables) {
    converted.push_back({pointer<const void>(address), num_rows, static_cast<hmi::DataType>(type),
                         pointer<const float>(scales), pointer<const uint16_t>(codebooks), piece_size});
  }
  return converted;
}

// (address, slots)
using NumberedIndex = std::pair<Address, int64_t>;

inline hmi::PlotIndex plot_index(Address slots, int64_t capacity) {
  return hmi::PlotIndex(pointer<hmi::IndexSlot>(slots), capacity);
}

inline std::vector<hmi::PlotIndex> plot_indexes(const std::vector<NumberedIndex>& indexes) {
  std::vector<hmi::PlotIndex> converted;
  for (const auto& [slots, capacity] : indexes) converted.push_back(plot_index(slots, capacity));
  return converted;
}

}  // namespace hmi::bindings
