// Everything that is compiled once per SIMD level. Include a vector_*.h first.
#include "cpu/simd/simd_kernels.h"
// clang-format off: each needs the one before
#include "cpu/simd/activations.inl"
#include "cpu/simd/matmul.inl"
#include "cpu/simd/merge_row.inl"
#include "cpu/simd/softmax.inl"
