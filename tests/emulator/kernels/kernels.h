// Small kernels whose results, races, bytes and bank conflicts are known by hand. Those that are right are made wrong
// by dropping their synchronizations (harness.py); the others are wrong in the one way that their name says.
#pragma once

#include <vector>

namespace emulator_tests {

// Runs a kernel over memory that it knows the use of.
using Launcher = void (*)(void* output, const void* input, int parameter);

struct NamedKernel {
  const char* name;
  Launcher launch;
};

std::vector<NamedKernel> async_copy_kernels();
std::vector<NamedKernel> bounds_kernels();
std::vector<NamedKernel> collective_kernels();
std::vector<NamedKernel> meeting_kernels();
std::vector<NamedKernel> race_kernels();
std::vector<NamedKernel> tensor_core_kernels();
std::vector<NamedKernel> traffic_kernels();

}  // namespace emulator_tests
