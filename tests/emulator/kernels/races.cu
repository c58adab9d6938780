// Accesses that nothing puts in order, though every schedule of the emulator may give the right result.
#include "kernels.h"
#include "launch_on_default.h"

namespace emulator_tests {
namespace {

using namespace hmi::cuda;

// Every thread writes the same value to the same place.
__global__ void same_shared_word_kernel(float* output, const float*, int) {
  HMI_SHARED(float, value, [1]);
  value[0] = 1.0f;
  __syncthreads();
  output[threadIdx.x] = value[0];
}

__global__ void same_global_word_kernel(float* output, const float*, int) {
  if (threadIdx.x == 0) output[0] = 1.0f;
}

// Block b writes what block b + 1 has read, or will read.
__global__ void neighbour_block_kernel(float* output, const float*, int) {
  if (threadIdx.x != 0) return;
  const unsigned next = (blockIdx.x + 1) % gridDim.x;
  output[blockIdx.x] = output[next] * 0.0f + 1.0f;
}

// Every block reads output[0]; then the last to run writes it, having read it itself.
__global__ void read_by_all_kernel(float* output, const float*, int writer) {
  if (threadIdx.x != 0) return;
  const float value = *const_cast<const volatile float*>(output);
  if (static_cast<int>(blockIdx.x) == writer) output[0] = value;
}

// A shuffle makes lanes meet, but puts no memory accesses in order.
__global__ void ordered_by_shuffle_kernel(float* output, const float* input, int) {
  HMI_SHARED(float, values, [32]);
  values[threadIdx.x] = input[threadIdx.x];
  const float zero = __shfl_xor_sync(0xffffffffu, 0.0f, 1);
  output[threadIdx.x] = values[threadIdx.x ^ 1] + zero;
}

// A barrier of each half of the warp does not order the halves.
__global__ void ordered_by_other_half_kernel(float* output, const float* input, int) {
  HMI_SHARED(float, values, [32]);
  values[threadIdx.x] = input[threadIdx.x];
  __syncwarp(threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u);
  output[threadIdx.x] = values[31 - threadIdx.x];
}

// Read by lane 0, then by lane 1, then written by lane 2, which only lane 1 is ordered with.
__global__ void two_readers_kernel(float* output, const float*, int) {
  HMI_SHARED(float, value, [1]);
  if (threadIdx.x == 2) value[0] = 1.0f;
  __syncwarp();
  float seen = 0.0f;
  if (threadIdx.x == 0) seen = value[0];
  if (threadIdx.x == 1) seen = value[0];
  if (threadIdx.x == 1 || threadIdx.x == 2) __syncwarp(0x6u);
  if (threadIdx.x == 2) value[0] = 2.0f;
  output[threadIdx.x] = seen;
}

// Reads as constant what it writes.
__global__ void constant_of_own_kernel(float* output, const float*, int) {
  const uint4 bytes = load16(output + 4 * threadIdx.x);
  store16(output + 4 * threadIdx.x, bytes);
}

__global__ void changing_of_own_kernel(float* output, const float*, int) {
  const uint4 bytes = load16_changing(output + 4 * threadIdx.x);
  store16(output + 4 * threadIdx.x, bytes);
}

template <void (*kernel)(float*, const float*, int), int kBlocks = 1>
void launch_warps(void* output, const void* input, int parameter) {
  launch(kernel, kBlocks, 32, 0, static_cast<float*>(output), static_cast<const float*>(input), parameter);
}

}  // namespace

std::vector<NamedKernel> race_kernels() {
  return {{"same_shared_word", &launch_warps<same_shared_word_kernel>},
          {"same_global_word", &launch_warps<same_global_word_kernel, 2>},
          {"neighbour_block", &launch_warps<neighbour_block_kernel, 4>},
          {"read_by_all", &launch_warps<read_by_all_kernel, 4>},
          {"ordered_by_shuffle", &launch_warps<ordered_by_shuffle_kernel>},
          {"ordered_by_other_half", &launch_warps<ordered_by_other_half_kernel>},
          {"two_readers", &launch_warps<two_readers_kernel>},
          {"constant_of_own", &launch_warps<constant_of_own_kernel>},
          {"changing_of_own", &launch_warps<changing_of_own_kernel>}};
}

}  // namespace emulator_tests
