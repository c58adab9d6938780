// Threads that meet, and threads that miss each other.
#include "kernels.h"
#include "launch_on_default.h"

namespace emulator_tests {
namespace {

using namespace hmi::cuda;

constexpr int kThreads = 128;

// output[block][thread] = linear index of the thread and its coordinates, folded into one number.
__global__ void coordinates_kernel(unsigned* output, const unsigned*, int) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  output[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      threadIdx.x + 100 * threadIdx.y + 10000 * threadIdx.z + 1000000 * block;
}

// The block's values in reverse.
__global__ void reverse_kernel(float* output, const float* input, int) {
  HMI_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = input[threadIdx.x];
  __syncthreads();
  output[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// Rounds through one buffer: the second barrier keeps a fast thread from writing what a slow one still reads. In order
// of their numbers no thread is too fast.
__global__ void shift_kernel(float* output, const float* input, int rounds) {
  HMI_SHARED(float, values, [kThreads]);
  float value = input[threadIdx.x];
  for (int round = 0; round < rounds; ++round) {
    values[threadIdx.x] = value;
    __syncthreads();
    value = values[min(threadIdx.x + 1, kThreads - 1u)];
    __syncthreads();
  }
  output[threadIdx.x] = value;
}

// Pitfall: a read that only another warp can overtake, by running far ahead. Warp sums pass through the same row twice;
// parameter 0: with a row for each sum, which needs no more barriers.
__global__ void two_sums_kernel(float* output, const float* input, int same_row) {
  HMI_SHARED(float, partial, [2][4]);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float total = 0.0f;
  for (int turn = 0; turn < 2; ++turn) {
    float sum = input[threadIdx.x] + static_cast<float>(turn);
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, distance);
    float* const row = partial[same_row ? 0 : turn];
    if (lane == 0) row[warp] = sum;
    __syncthreads();
    for (int i = 0; i < 4; ++i) total += row[i];
  }
  output[threadIdx.x] = total;
}

// A lane writes for its neighbours of the same warp.
__global__ void exchange_in_warp_kernel(float* output, const float* input, int) {
  HMI_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = input[threadIdx.x];
  __syncwarp();
  output[threadIdx.x] = values[threadIdx.x ^ 1];
}

// The same among half a warp, with a mask.
__global__ void exchange_in_half_kernel(float* output, const float* input, int) {
  HMI_SHARED(float, values, [32]);
  const unsigned lane = threadIdx.x;
  const unsigned mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  values[lane] = input[lane];
  __syncwarp(mask);
  output[lane] = values[lane ^ 15];
}

// Two barriers where one is enough.
__global__ void one_too_many_kernel(float* output, const float* input, int) {
  HMI_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = input[threadIdx.x];
  __syncthreads();
  __syncthreads();
  output[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// Threads that have exited do not hold up the others.
__global__ void some_exit_kernel(float* output, const float* input, int num_that_stay) {
  HMI_SHARED(float, values, [kThreads]);
  if (static_cast<int>(threadIdx.x) >= num_that_stay) return;
  values[threadIdx.x] = input[threadIdx.x];
  __syncthreads();
  output[threadIdx.x] = values[num_that_stay - 1 - threadIdx.x];
}

__global__ void divergent_barriers_kernel(float*, const float*, int) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// Half a warp waits for a shuffle of the whole warp, the others for a barrier of the whole block.
__global__ void deadlock_kernel(float* output, const float*, int) {
  if (threadIdx.x % 32 < 16) {
    output[0] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  } else {
    __syncthreads();
  }
}

// Lanes that have exited are still named by the others' mask.
__global__ void exited_lanes_kernel(float* output, const float*, int) {
  if (threadIdx.x % 32 >= 16) return;
  output[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void fault_kernel(unsigned long long* fault, const float*, int) { report_fault(fault, threadIdx.x + 1); }

template <void (*kernel)(float*, const float*, int), int kBlock = kThreads>
void launch_block(void* output, const void* input, int parameter) {
  launch(kernel, 1, kBlock, 0, static_cast<float*>(output), static_cast<const float*>(input), parameter);
}

void launch_coordinates(void* output, const void*, int) {
  launch(&coordinates_kernel, dim3(2, 3, 2), dim3(4, 3, 2), 0, static_cast<unsigned*>(output),
         static_cast<const unsigned*>(nullptr), 0);
}

void launch_fault(void* output, const void*, int) {
  launch(&fault_kernel, 1, kThreads, 0, static_cast<unsigned long long*>(output), static_cast<const float*>(nullptr), 0);
}

}  // namespace

std::vector<NamedKernel> meeting_kernels() {
  return {{"coordinates", &launch_coordinates},
          {"reverse", &launch_block<reverse_kernel>},
          {"shift", &launch_block<shift_kernel>},
          {"two_sums", &launch_block<two_sums_kernel>},
          {"exchange_in_warp", &launch_block<exchange_in_warp_kernel>},
          {"exchange_in_half", &launch_block<exchange_in_half_kernel, 32>},
          {"one_too_many", &launch_block<one_too_many_kernel>},
          {"some_exit", &launch_block<some_exit_kernel>},
          {"divergent_barriers", &launch_block<divergent_barriers_kernel, 64>},
          {"deadlock", &launch_block<deadlock_kernel, 64>},
          {"exited_lanes", &launch_block<exited_lanes_kernel, 64>},
          {"fault", &launch_fault}};
}

}  // namespace emulator_tests
