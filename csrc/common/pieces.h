// Batches of copies: many disjoint pieces of memory.
#pragma once

#include <cstdint>
#include <vector>

namespace hmi {

struct Piece {
  void* destination;
  const void* source;
  int64_t bytes;
};

// From addresses and sizes. Throws std::invalid_argument unless there are as many of each.
std::vector<Piece> make_pieces(const std::vector<uintptr_t>& destinations, const std::vector<uintptr_t>& sources,
                               const std::vector<int64_t>& sizes);

// Throws std::invalid_argument if two destinations meet, or a destination and a source do.
void require_disjoint(const std::vector<Piece>& pieces);

// On the host.
void copy_pieces(const std::vector<Piece>& pieces);

}  // namespace hmi
