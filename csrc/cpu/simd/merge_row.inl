// Sums the rows that make one token's hidden state, adds its position and normalizes the result.

namespace hmi {
namespace {

constexpr int kUnroll = 4;  // independent sums, enough to hide the latency of an addition

// Up to kUnroll neighboring vectors of a row; the last of them may be partial.
struct Block {
  int64_t at;  // of the first element
  int lanes;   // of the last vector
};

template <int kVectors, class Element>
inline void load_block(const Element* row, Block block, Vector (&to)[kVectors]) {
  const Element* from = row + block.at;
#pragma GCC unroll 4
  for (int v = 0; v + 1 < kVectors; ++v) to[v] = load(from + v * kLanes);
  const Element* last = from + (kVectors - 1) * kLanes;
  to[kVectors - 1] = block.lanes == kLanes ? load(last) : load_first(last, block.lanes);
}

// The halves that codes stand for, from the element `at` on; `at` is a multiple of kLanes.
template <int kPiece>
struct Pieces {
  const uint8_t* codes;
  const uint16_t* codebook;

  const uint16_t* piece(int64_t number) const {
    return codebook + (number * kCodebookSize + codes[number]) * kPiece;
  }

  Vector load(int64_t at) const {
    if constexpr (kPiece >= kLanes) {
      return hmi::load(piece(at / kPiece) + at % kPiece);
    } else {
      const uint16_t* pieces[kLanes / kPiece];
#pragma GCC unroll 4
      for (int i = 0; i < kLanes / kPiece; ++i) pieces[i] = piece(at / kPiece + i);
      return load_joined(pieces);
    }
  }

  // The row ends after so many lanes, and with it a piece.
  Vector load_first(int64_t at, int lanes) const {
    alignas(2 * kLanes) uint16_t halves[kLanes] = {};
    for (int lane = 0; lane < lanes; lane += kPiece) {
      __builtin_memcpy(halves + lane, piece((at + lane) / kPiece), sizeof(uint16_t) * kPiece);
    }
    return hmi::load(halves);
  }
};

template <int kPiece, int kVectors>
inline void load_pieces(const MergeSource& source, Block block, Vector (&to)[kVectors]) {
  const Pieces<kPiece> pieces = {static_cast<const uint8_t*>(source.row), source.codebook};
#pragma GCC unroll 4
  for (int v = 0; v + 1 < kVectors; ++v) to[v] = pieces.load(block.at + v * kLanes);
  const int64_t last = block.at + (kVectors - 1) * kLanes;
  if constexpr (kPiece >= kLanes) {  // a row of whole pieces then ends with a whole vector
    to[kVectors - 1] = pieces.load(last);
  } else {
    to[kVectors - 1] = block.lanes == kLanes ? pieces.load(last) : pieces.load_first(last, block.lanes);
  }
}

template <int kVectors>
inline void load_source(const MergeSource& source, Block block, Vector (&to)[kVectors]) {
  if (source.type == DataType::kFloat16) return load_block(static_cast<const uint16_t*>(source.row), block, to);
  if (source.type == DataType::kFloat32) return load_block(static_cast<const float*>(source.row), block, to);
  if (source.type == DataType::kCode) {
    return source.piece_size == 4 ? load_pieces<4>(source, block, to) : load_pieces<8>(source, block, to);
  }
  load_block(static_cast<const int8_t*>(source.row), block, to);
  const Vector scale = broadcast(source.scale);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) to[v] = multiply(to[v], scale);
}

template <int kVectors>
inline void store_block(float* row, Block block, const Vector (&from)[kVectors]) {
  float* to = row + block.at;
#pragma GCC unroll 4
  for (int v = 0; v + 1 < kVectors; ++v) store(to + v * kLanes, from[v]);
  float* last = to + (kVectors - 1) * kLanes;
  block.lanes == kLanes ? store(last, from[kVectors - 1]) : store_first(last, from[kVectors - 1], block.lanes);
}

template <int kVectors>
inline void sum_sources(const MergeArguments& a, Block block, Vector (&total)[kVectors]) {
  Vector value[kVectors];
  load_source(a.sources[0], block, total);
  for (int s = 1; s < a.num_sources; ++s) {
    load_source(a.sources[s], block, value);
    const bool is_subtracted = a.subtract_last && s == a.num_sources - 1;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      total[v] = is_subtracted ? subtract(total[v], value[v]) : add(total[v], value[v]);
    }
  }
  load_block(a.position, block, value);
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) total[v] = add(total[v], value[v]);
}

// Calls body(block, an array of as many vectors as the block has) over the whole row.
template <class Body>
inline void for_each_block(int64_t size, Body body) {
  int64_t at = 0;
  for (; at + kUnroll * kLanes <= size; at += kUnroll * kLanes) {
    Vector vectors[kUnroll];
    body(Block{at, kLanes}, vectors);
  }
  for (; at < size; at += kLanes) {
    Vector vector[1];
    body(Block{at, size - at < kLanes ? static_cast<int>(size - at) : kLanes}, vector);
  }
}

inline float total(const Vector (&sums)[kUnroll]) { return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))); }

void merge_row(const MergeArguments& a) {
  Vector sums[kUnroll] = {zero(), zero(), zero(), zero()};
  for_each_block(a.hidden_size, [&](Block block, auto& values) {
    constexpr int kVectors = sizeof(values) / sizeof(values[0]);
    sum_sources(a, block, values);
    store_block(a.output, block, values);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[v] = add(sums[v], values[v]);
  });
  const Vector mean = broadcast(total(sums) / static_cast<float>(a.hidden_size));

  // The variance from the deviations, in a second pass: the difference of squares would cancel.
  Vector squares[kUnroll] = {zero(), zero(), zero(), zero()};
  for_each_block(a.hidden_size, [&](Block block, auto& values) {
    constexpr int kVectors = sizeof(values) / sizeof(values[0]);
    load_block(a.output, block, values);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector deviation = subtract(values[v], mean);
      if (v == kVectors - 1 && block.lanes < kLanes) deviation = keep_first(deviation, block.lanes);
      squares[v] = multiply_add(deviation, deviation, squares[v]);
    }
  });
  const float variance = total(squares) / static_cast<float>(a.hidden_size);
  const Vector factor = broadcast(1.0f / __builtin_sqrtf(variance + a.epsilon));

  for_each_block(a.hidden_size, [&](Block block, auto& values) {
    constexpr int kVectors = sizeof(values) / sizeof(values[0]);
    Vector weights[kVectors], biases[kVectors];
    load_block(a.output, block, values);
    load_block(a.weight, block, weights);
    load_block(a.bias, block, biases);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      values[v] = multiply_add(multiply(subtract(values[v], mean), factor), weights[v], biases[v]);
    }
    store_block(a.output, block, values);
  });
}

}  // namespace
}  // namespace hmi
