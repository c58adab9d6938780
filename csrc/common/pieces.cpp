#include "common/pieces.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace hmi {
namespace {

struct Interval {
  uintptr_t begin;
  uintptr_t end;
  int64_t piece;
};

std::vector<Interval> sorted_destinations(const std::vector<Piece>& pieces) {
  std::vector<Interval> intervals;
  intervals.reserve(pieces.size());
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(pieces[i].destination);
    if (pieces[i].bytes > 0) intervals.push_back({begin, begin + pieces[i].bytes, static_cast<int64_t>(i)});
  }
  std::sort(intervals.begin(), intervals.end(), [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  return intervals;
}

}  // namespace

std::vector<Piece> make_pieces(const std::vector<uintptr_t>& destinations, const std::vector<uintptr_t>& sources,
                               const std::vector<int64_t>& sizes) {
  if (destinations.size() != sizes.size() || sources.size() != sizes.size()) {
    throw std::invalid_argument("destinations, sources and sizes must be equally many");
  }
  std::vector<Piece> pieces;
  pieces.reserve(sizes.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    pieces.push_back({reinterpret_cast<void*>(destinations[i]), reinterpret_cast<const void*>(sources[i]), sizes[i]});
  }
  return pieces;
}

void require_disjoint(const std::vector<Piece>& pieces) {
  const std::vector<Interval> destinations = sorted_destinations(pieces);
  for (size_t i = 1; i < destinations.size(); ++i) {
    const Interval &previous = destinations[i - 1], &next = destinations[i];
    if (next.begin < previous.end) {
      throw std::invalid_argument("destinations " + std::to_string(std::min(previous.piece, next.piece)) + " and " +
                                  std::to_string(std::max(previous.piece, next.piece)) + " share memory");
    }
  }
  for (size_t i = 0; i < pieces.size(); ++i) {
    const auto begin = reinterpret_cast<uintptr_t>(pieces[i].source), end = begin + pieces[i].bytes;
    // The destinations are disjoint, so their ends rise too.
    const auto first = std::upper_bound(destinations.begin(), destinations.end(), begin,
                                        [](uintptr_t address, const Interval& interval) { return address < interval.end; });
    if (pieces[i].bytes > 0 && first != destinations.end() && first->begin < end) {
      throw std::invalid_argument("source " + std::to_string(i) + " and destination " + std::to_string(first->piece) +
                                  " share memory");
    }
  }
}

void copy_pieces(const std::vector<Piece>& pieces) {
  for (const Piece& piece : pieces) {
    if (piece.bytes > 0) std::memcpy(piece.destination, piece.source, piece.bytes);
  }
}

}  // namespace hmi
