// Launches a test's kernel.
#pragma once

#include "cuda/device.cuh"
#include "cuda/error.h"

namespace emulator_tests {

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  hmi::cuda::require("launch", hmi::cuda::launch(kernel, grid, block, shared_bytes, nullptr, arguments...));
}

}  // namespace emulator_tests
