#include "cpu/simd/vector_avx2.h"
// clang-format off: the kernels need the vector
#include "cpu/simd/kernels.inl"

namespace hmi {
const SimdKernels avx2_kernels = {"avx2", merge_row, matmul_activate, matmul_accumulate, softmax_rows};
}  // namespace hmi
