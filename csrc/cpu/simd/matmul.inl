// Thin matrix products in register tiles: rows of activations times a row-major [depth, columns] block of weights,
// which is already in the order that the tiles read, so that nothing is packed.

namespace hmi {
namespace {

struct Store {
  void full(float* to, Vector value) const { store(to, value); }
  void partial(float* to, Vector value, int count) const { store_first(to, value, count); }
};

struct AccumulateScaled {
  Vector scale;
  void full(float* to, Vector value) const { store(to, multiply_add(value, scale, load(to))); }
  void partial(float* to, Vector value, int count) const {
    store_first(to, multiply_add(value, scale, load_first(to, count)), count);
  }
};

// One tile of kRows x kVectors sums kept in registers over the whole depth. kTail: the last vector has `tail` lanes.
template <int kRows, int kVectors, bool kTail, class Epilogue>
inline void multiply_tile(const MatmulArguments& m, int64_t row, int64_t column, int tail, Epilogue epilogue) {
  Vector sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = zero();
  }
  const float* input = m.inputs + row * m.input_stride;
  const float* weight = m.weights + column;
  for (int64_t k = 0; k < m.depth; ++k, weight += m.columns) {
    Vector weights[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const float* from = weight + v * kLanes;
      weights[v] = kTail && v == kVectors - 1 ? load_first(from, tail) : load(from);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vector value = broadcast(input[r * m.input_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = multiply_add(value, weights[v], sums[r][v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const bool is_partial = kTail && v == kVectors - 1;
    const int64_t at = column + v * kLanes;
    Vector bias = zero();
    if (m.bias != nullptr) bias = is_partial ? load_first(m.bias + at, tail) : load(m.bias + at);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      float* to = m.outputs + (row + r) * m.output_stride + at;
      const Vector value = add(sums[r][v], bias);
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
