// Products of segments of rows with a matrix of each segment's slot, and the gradients of those matrices: what the
// backward pass of the grouped adapters is made of. In float32.
#pragma once

#include <cstdint>

#include "common/segments.h"

namespace hmi {

// Rows of a matrix, `stride` elements apart.
struct Rows {
  const float* start;
  int64_t stride;
  int64_t columns;
};

// outputs[t, :width] = inputs[t, :depth] @ M, where M is the matrix [depth, width] of t's slot, or with is_transposed
// the transpose of that matrix [width, depth]; other elements of outputs [num_tokens, output_size] stay as they are.
// A row's result depends neither on other rows nor on the number of threads, bit for bit. Throws
// std::invalid_argument, before anything is changed, if a value is out of bounds.
void grouped_product(float* outputs, int64_t output_size, const Rows& inputs, const float* arena,
                     const Segments& segments, const MatrixTable& table, bool is_transposed, int num_threads);

// The matrix [rows, columns] of each slot in gradient = sum over the rows t of its segments of the outer product of
// inputs[t, :rows] and output_gradients[t, :columns]; what no slot of a segment owns stays as it is. The sums' order
// depends on the segments alone. Throws as grouped_product, and if two slots' matrices overlap.
void grouped_weight_gradient(float* gradient, const Rows& inputs, const Rows& output_gradients,
                             const Segments& segments, const MatrixTable& table, int num_threads);

}  // namespace hmi
