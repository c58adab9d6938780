// Thin matrix products in register tiles: rows of activations times a row-major [depth, columns] block of weights,
// which is already in the order that the tiles read, so that nothing is packed.

namespace hmi {
namespace {

struct Store {
  void prefetch(const float*) const {}
  void full(float* to, Vector value) const { store(to, value); }
  void partial(float* to, Vector value, int count) const { store_first(to, value, count); }
};

struct AccumulateScaled {
  Vector scale;
  [[gnu::always_inline]] void prefetch(const float* to) const { __builtin_prefetch(to, 1); }
  void full(float* to, Vector value) const { store(to, multiply_add(value, scale, load(to))); }
  void partial(float* to, Vector value, int count) const {
    store_first(to, multiply_add(value, scale, load_first(to, count)), count);
  }
};

// A tile's sums. Narrow tiles keep several for each element, over every kChains-th product, so that even one row has
// enough independent multiply-adds in flight. How many depends on the columns alone, never on the rows.
template <int kRows, int kVectors>
struct TileSums {
  static constexpr int kChains = tile_chains(kVectors);
  Vector chains[kChains][kRows][kVectors];

  [[gnu::always_inline]] TileSums() {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) chains[c][r][v] = zero();
      }
    }
  }

  [[gnu::always_inline]] void add_products(int chain, const float* input, int64_t stride, const float* weight,
                                           int last_lanes, bool is_partial) {
    Vector weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const float* from = weight + v * kLanes;
      weights[v] = is_partial && v == kVectors - 1 ? load_first(from, last_lanes) : load(from);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector value = broadcast(input[r * stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) chains[chain][r][v] = multiply_add(value, weights[v], chains[chain][r][v]);
    }
  }

  [[gnu::always_inline]] Vector get(int r, int v) const {
    if constexpr (kChains == 4) return add(add(chains[0][r][v], chains[1][r][v]), add(chains[2][r][v], chains[3][r][v]));
    if constexpr (kChains == 2) return add(chains[0][r][v], chains[1][r][v]);
    return chains[0][r][v];
  }
};

// One tile of kRows x kVectors sums kept in registers over the whole depth. kTail: the last vector has `tail` lanes.
template <int kRows, int kVectors, bool kTail, class Epilogue>
inline void multiply_tile(const MatmulArguments& m, int64_t row, int64_t column, int tail, Epilogue epilogue) {
  TileSums<kRows, kVectors> sums;
  constexpr int kChains = sums.kChains;
  const float* input = m.inputs + row * m.input_stride;
  const float* weight = m.weights + column;
  float* output = m.outputs + row * m.output_stride + column;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) epilogue.prefetch(output + r * m.output_stride + v * kLanes);
  }
  int64_t k = 0;
  for (; k + kChains <= m.depth; k += kChains, weight += kChains * m.weight_stride) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; ++c) {
      sums.add_products(c, input + k + c, m.input_stride, weight + c * m.weight_stride, tail, kTail);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < kChains - 1; ++c) {
    if (k + c < m.depth) sums.add_products(c, input + k + c, m.input_stride, weight + c * m.weight_stride, tail, kTail);
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const bool is_partial = kTail && v == kVectors - 1;
    const float* from = m.bias + column + v * kLanes;
    const Vector bias = m.bias == nullptr ? zero() : is_partial ? load_first(from, tail) : load(from);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      float* to = output + r * m.output_stride + v * kLanes;
      const Vector value = add(sums.get(r, v), bias);
      is_partial ? epilogue.partial(to, value, tail) : epilogue.full(to, value);
    }
  }
}

template <int kRows, int kVectors, bool kTail, class Epilogue>
void multiply_last_rows(const MatmulArguments& m, int64_t row, int64_t column, int tail, Epilogue epilogue) {
  if constexpr (kRows > 0) {
    if (m.num_rows - row == kRows) return multiply_tile<kRows, kVectors, kTail>(m, row, column, tail, epilogue);
    multiply_last_rows<kRows - 1, kVectors, kTail>(m, row, column, tail, epilogue);
  }
}

// All rows of a panel of columns that is one tile wide: the panel's weights stay in the first-level cache.
template <int kVectors, bool kTail, class Epilogue>
void multiply_panel(const MatmulArguments& m, int64_t column, int tail, Epilogue epilogue) {
  constexpr int kRows = max_tile_rows(kVectors);
  int64_t row = 0;
  for (; row + kRows <= m.num_rows; row += kRows) {
    multiply_tile<kRows, kVectors, kTail>(m, row, column, tail, epilogue);
  }
  multiply_last_rows<kRows - 1, kVectors, kTail>(m, row, column, tail, epilogue);
}

template <int kVectors, class Epilogue>
void multiply_last_panel(const MatmulArguments& m, int64_t column, Epilogue epilogue) {
  if constexpr (kVectors > 0) {
    const int64_t before_last = column + (kVectors - 1) * kLanes;
    if (m.columns <= before_last) return multiply_last_panel<kVectors - 1>(m, column, epilogue);
    const int tail = static_cast<int>(m.columns - before_last);
    tail == kLanes ? multiply_panel<kVectors, false>(m, column, tail, epilogue)
                   : multiply_panel<kVectors, true>(m, column, tail, epilogue);
  }
}

template <class Epilogue>
void multiply_matrices(const MatmulArguments& m, Epilogue epilogue) {
  constexpr int kPanel = kMaxTileVectors * kLanes;
  int64_t column = 0;
  for (; column + kPanel <= m.columns; column += kPanel) {
    multiply_panel<kMaxTileVectors, false>(m, column, kLanes, epilogue);
  }
  multiply_last_panel<kMaxTileVectors>(m, column, epilogue);
}

void matmul_activate(const MatmulArguments& m, Activation activation) {
  multiply_matrices(m, Store{});
  if (activation == kIdentity) return;
  for (int64_t row = 0; row < m.num_rows; ++row) {
    apply_activation(activation, m.outputs + row * m.output_stride, m.columns);
  }
}

void matmul_accumulate(const MatmulArguments& m, float scale) {
  multiply_matrices(m, AccumulateScaled{broadcast(scale)});
}

}  // namespace
}  // namespace hmi
