// The element types that cross the boundary between Python and the kernels.
#pragma once

#include <stdint.h>  // not <cstdint>: the SIMD files include no header of the C++ library

namespace hmi {

// kCode is a uint8 that tells which piece of a codebook is meant.
enum class DataType : int32_t { kFloat32, kFloat16, kBfloat16, kInt8, kCode };

constexpr int kCodebookSize = 256;  // pieces that a code chooses from

}  // namespace hmi
