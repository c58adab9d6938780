// The element types that cross the boundary between Python and the kernels.
#pragma once

#include <stdint.h>  // not <cstdint>: the SIMD files include no header of the C++ library

namespace hmi {

enum class DataType : int32_t { kFloat32, kFloat16, kBfloat16, kInt8 };

}  // namespace hmi
