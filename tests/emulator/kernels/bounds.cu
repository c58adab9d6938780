// Accesses out of bounds, and launches that no device can run.
#include "kernels.h"
#include "launch_on_default.h"

namespace emulator_tests {
namespace {

using namespace hmi::cuda;

// output[i] = input[i + offset]: AddressSanitizer knows the ends of both.
__global__ void read_at_offset_kernel(float* output, const float* input, int offset) {
  output[threadIdx.x] = input[static_cast<int>(threadIdx.x) + offset];
}

__global__ void write_at_offset_kernel(float* output, const float* input, int offset) {
  output[static_cast<int>(threadIdx.x) + offset] = input[threadIdx.x];
}

__global__ void copy_at_offset_kernel(float* output, const float* input, int offset) {
  HMI_SHARED(float, unit, [4]);
  cp_async16(unit, input + offset);
  cp_async_commit();
  cp_async_wait<0>();
  output[0] = unit[0];
}

__global__ void static_index_kernel(float* output, const float*, int index) {
  HMI_SHARED(float, values, [32]);
  values[threadIdx.x] = 1.0f;
  __syncwarp();
  output[threadIdx.x] = values[index];
}

__global__ void past_dynamic_kernel(float* output, const float*, int floats_past) {
  HMI_DYNAMIC_SHARED(bytes);
  reinterpret_cast<float*>(bytes)[31 + floats_past] = 1.0f;
  output[0] = 1.0f;
}

__global__ void misaligned_load_kernel(float* output, const float* input, int floats_off) {
  const uint4 bytes = load16(input + floats_off);
  __builtin_memcpy(output, &bytes, sizeof bytes);
}

__global__ void large_static_kernel(float* output, const float*, int) {
  HMI_SHARED(float, values, [13000]);
  values[threadIdx.x] = 0.0f;
  output[threadIdx.x] = values[threadIdx.x];
}

// Dynamic shared memory at the start of a block, which an earlier block has written.
__global__ void fresh_shared_kernel(float* output, const float*, int) {
  HMI_DYNAMIC_SHARED(bytes);
  HMI_SHARED(float, values, [32]);
  float* const dynamic = reinterpret_cast<float*>(bytes);
  const int lane = threadIdx.x;
  output[blockIdx.x * 64 + lane] = dynamic[lane];
  output[blockIdx.x * 64 + 32 + lane] = values[lane];
  dynamic[lane] = values[lane] = 1.0f;
}

struct Large {
  char bytes[4097];
};
__global__ void empty_kernel() {}
__global__ void large_parameter_kernel(Large) {}

template <void (*kernel)(float*, const float*, int)>
void launch_warp(void* output, const void* input, int parameter) {
  launch(kernel, 1, 32, 32 * sizeof(float), static_cast<float*>(output), static_cast<const float*>(input), parameter);
}

void launch_fresh(void* output, const void*, int num_blocks) {
  launch(&fresh_shared_kernel, num_blocks, 32, 32 * sizeof(float), static_cast<float*>(output),
         static_cast<const float*>(nullptr), 0);
}

// input holds grid x y z, block x y z, bytes of shared memory.
void launch_shaped(void*, const void* input, int) {
  const auto* shape = static_cast<const uint32_t*>(input);
  launch(&empty_kernel, dim3(shape[0], shape[1], shape[2]), dim3(shape[3], shape[4], shape[5]), shape[6]);
}

void launch_large_parameter(void*, const void*, int) { launch(&large_parameter_kernel, 1, 32, 0, Large{}); }

}  // namespace

std::vector<NamedKernel> bounds_kernels() {
  return {{"read_at_offset", &launch_warp<read_at_offset_kernel>},
          {"write_at_offset", &launch_warp<write_at_offset_kernel>},
          {"copy_at_offset", &launch_warp<copy_at_offset_kernel>},
          {"static_index", &launch_warp<static_index_kernel>},
          {"past_dynamic", &launch_warp<past_dynamic_kernel>},
          {"misaligned_load", &launch_warp<misaligned_load_kernel>},
          {"large_static", &launch_warp<large_static_kernel>},
          {"fresh_shared", &launch_fresh},
          {"shaped", &launch_shaped},
          {"large_parameter", &launch_large_parameter}};
}

}  // namespace emulator_tests
