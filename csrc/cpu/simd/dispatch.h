// Chooses, once and at run time, the SIMD level that this machine can run.
#pragma once

#include <string>
#include <vector>

#include "cpu/simd/simd_kernels.h"

namespace hmi {

// Names of the levels compiled in, lowest first, whether or not this machine has them.
std::vector<std::string> compiled_simd_levels();
// Those of them that this machine can run.
std::vector<std::string> available_simd_levels();
// "auto" for the highest. Throws std::invalid_argument on a level that does not exist here.
void set_simd_level(const std::string& name);
const SimdKernels& active_kernels();

}  // namespace hmi
