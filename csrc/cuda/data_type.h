// The element types that cross the boundary between Python and the kernels.
#pragma once

#include <cstdint>

namespace hmi::cuda {

enum class DataType : int32_t { kFloat32, kFloat16, kBfloat16, kInt8 };

}  // namespace hmi::cuda
