// cp.async, right and wrong.
#include "kernels.h"
#include "launch_on_default.h"

namespace emulator_tests {
namespace {

using namespace hmi::cuda;

constexpr int kThreads = 64;
constexpr int kStages = 3;
constexpr int kUnit = 4;  // floats of one copy

// output[chunk][thread] = sum of what the next thread's unit of that chunk holds: a ring of kStages buffers.
__global__ void pipeline_kernel(float* output, const float* input, int num_chunks) {
  HMI_DYNAMIC_SHARED(bytes);
  float* const ring = reinterpret_cast<float*>(bytes);
  const int thread = threadIdx.x;
  const auto load = [&](int chunk) {
    if (chunk < num_chunks) {
      cp_async16(ring + (chunk % kStages * kThreads + thread) * kUnit, input + (chunk * kThreads + thread) * kUnit);
    }
    cp_async_commit();
  };
  for (int chunk = 0; chunk < kStages - 1; ++chunk) load(chunk);
  for (int chunk = 0; chunk < num_chunks; ++chunk) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load(chunk + kStages - 1);  // into the buffer that the last round read
    const float* unit = ring + (chunk % kStages * kThreads + (thread + 1) % kThreads) * kUnit;
    output[chunk * kThreads + thread] = unit[0] + unit[1] + unit[2] + unit[3];
  }
}

// Lanes from parameter on ask for zeros, with a source that must not be read.
__global__ void zero_fill_kernel(float* output, const float* input, int num_valid) {
  HMI_SHARED(float, units, [32][kUnit]);
  const int lane = threadIdx.x;
  const bool valid = lane < num_valid;
  cp_async16(units[lane], input + (valid ? lane * kUnit : 0), valid);
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < kUnit; ++i) output[lane * kUnit + i] = units[lane][i];
}

// Reads its own copy without a wait.
__global__ void unwaited_kernel(float* output, const float* input, int) {
  HMI_SHARED(float, units, [32][kUnit]);
  cp_async16(units[threadIdx.x], input + threadIdx.x * kUnit);
  cp_async_commit();
  output[threadIdx.x] = units[threadIdx.x][0];
  cp_async_wait<0>();
}

__global__ void exit_with_copies_kernel(float*, const float* input, int) {
  HMI_SHARED(float, units, [32][kUnit]);
  cp_async16(units[threadIdx.x], input + threadIdx.x * kUnit);
  cp_async_commit();
}

__global__ void misaligned_copy_kernel(float*, const float* input, int floats_off) {
  HMI_SHARED(float, units, [33][kUnit]);
  cp_async16(&units[threadIdx.x][0] + floats_off, input + threadIdx.x * kUnit);
}

__global__ void misaligned_source_kernel(float*, const float* input, int floats_off) {
  HMI_SHARED(float, units, [32][kUnit]);
  cp_async16(units[threadIdx.x], input + threadIdx.x * kUnit + floats_off);
}

__global__ void copy_to_global_kernel(float* output, const float* input, int) { cp_async16(output, input); }

template <void (*kernel)(float*, const float*, int)>
void launch_warp(void* output, const void* input, int parameter) {
  launch(kernel, 1, 32, 0, static_cast<float*>(output), static_cast<const float*>(input), parameter);
}

void launch_pipeline(void* output, const void* input, int num_chunks) {
  launch(&pipeline_kernel, 1, kThreads, sizeof(float) * kStages * kThreads * kUnit, static_cast<float*>(output),
         static_cast<const float*>(input), num_chunks);
}

}  // namespace

std::vector<NamedKernel> async_copy_kernels() {
  return {{"pipeline", &launch_pipeline},
          {"zero_fill", &launch_warp<zero_fill_kernel>},
          {"unwaited", &launch_warp<unwaited_kernel>},
          {"exit_with_copies", &launch_warp<exit_with_copies_kernel>},
          {"misaligned_copy", &launch_warp<misaligned_copy_kernel>},
          {"misaligned_source", &launch_warp<misaligned_source_kernel>},
          {"copy_to_global", &launch_warp<copy_to_global_kernel>}};
}

}  // namespace emulator_tests
