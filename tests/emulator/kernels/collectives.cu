// What the lanes of a warp tell each other. output[collective][lane] of 32-bit integers from input[lane].
#include "kernels.h"
#include "launch_on_default.h"

namespace emulator_tests {
namespace {

using namespace hmi::cuda;

constexpr unsigned kFull = 0xffffffffu;

// parameter: the width of a part of the warp.
__global__ void shuffles_kernel(int* output, const int* input, int width) {
  const int lane = threadIdx.x;
  const int value = input[lane];
  output[0 * 32 + lane] = __shfl_sync(kFull, value, 5, width);
  output[1 * 32 + lane] = __shfl_sync(kFull, value, lane + 3, width);
  output[2 * 32 + lane] = __shfl_xor_sync(kFull, value, 6, width);
  output[3 * 32 + lane] = __shfl_up_sync(kFull, value, 3, width);
  output[4 * 32 + lane] = __shfl_down_sync(kFull, value, 3, width);
}

// parameter: the threshold of the vote.
__global__ void votes_kernel(unsigned* output, const int* input, int threshold) {
  const int lane = threadIdx.x;
  const bool vote = input[lane] < threshold;
  output[0 * 32 + lane] = __ballot_sync(kFull, vote);
  output[1 * 32 + lane] = __any_sync(kFull, vote);
  output[2 * 32 + lane] = __all_sync(kFull, vote);
  output[3 * 32 + lane] = __syncthreads_count(vote);
  output[4 * 32 + lane] = __syncthreads_or(vote);
  output[5 * 32 + lane] = __syncthreads_and(vote);
  output[6 * 32 + lane] = __activemask() >> lane & 1;
}

// The halves of the warp go different ways, each with its own mask; sums over each.
__global__ void halves_kernel(int* output, const int* input, int) {
  const int lane = threadIdx.x;
  int sum = input[lane];
  if (lane < 16) {
    for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(0x0000ffffu, sum, distance);
  } else {
    for (int distance = 8; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffff0000u, sum, distance);
  }
  output[lane] = sum;
}

// A warp of 20 threads under the full mask.
__global__ void partial_warp_kernel(int* output, const int* input, int) {
  const int lane = threadIdx.x;
  output[lane] = __ballot_sync(kFull, input[lane] > 0);
}

__global__ void outside_mask_kernel(int* output, const int* input, int) {
  if (threadIdx.x < 16) output[threadIdx.x] = __shfl_sync(0x0000ffffu, input[threadIdx.x], 20);
}

__global__ void not_in_own_mask_kernel(int* output, const int* input, int) {
  output[threadIdx.x] = __shfl_sync(0x0000ffffu, input[threadIdx.x], 0);
}

__global__ void different_masks_kernel(int* output, const int* input, int) {
  output[threadIdx.x] = __shfl_sync(threadIdx.x < 16 ? 0xffffffffu : 0xffff0001u, input[threadIdx.x], 0);
}

__global__ void wide_values_kernel(double* output, const double* input, int) {
  output[threadIdx.x] = __shfl_xor_sync(kFull, input[threadIdx.x], 1);
}

template <class Output, class Input, void (*kernel)(Output*, const Input*, int), int kThreads = 32>
void launch_warp(void* output, const void* input, int parameter) {
  launch(kernel, 1, kThreads, 0, static_cast<Output*>(output), static_cast<const Input*>(input), parameter);
}

}  // namespace

std::vector<NamedKernel> collective_kernels() {
  return {{"shuffles", &launch_warp<int, int, shuffles_kernel>},
          {"votes", &launch_warp<unsigned, int, votes_kernel>},
          {"halves", &launch_warp<int, int, halves_kernel>},
          {"partial_warp", &launch_warp<int, int, partial_warp_kernel, 20>},
          {"outside_mask", &launch_warp<int, int, outside_mask_kernel>},
          {"not_in_own_mask", &launch_warp<int, int, not_in_own_mask_kernel>},
          {"different_masks", &launch_warp<int, int, different_masks_kernel>},
          {"wide_values", &launch_warp<double, double, wide_values_kernel>}};
}

}  // namespace emulator_tests
