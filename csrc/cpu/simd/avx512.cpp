#include "cpu/simd/vector_avx512.h"
// clang-format off: the kernels need the vector
#include "cpu/simd/kernels.inl"

namespace hmi {
const SimdKernels avx512_kernels = {"avx512", merge_row, matmul_activate, matmul_accumulate, softmax_rows};
}  // namespace hmi
