#include "cpu/simd/vector_portable.h"
// clang-format off: the kernels need the vector
#include "cpu/simd/kernels.inl"

namespace hmi {
const SimdKernels portable_kernels = {"portable", merge_row, matmul_activate, matmul_accumulate, softmax_rows};
}  // namespace hmi
