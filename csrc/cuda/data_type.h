// The element types of device memory: those of the host.
#pragma once

#include "common/data_type.h"

namespace hmi::cuda {

using hmi::DataType;

}  // namespace hmi::cuda
