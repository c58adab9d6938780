// Accesses whose sectors and bank conflicts are known by hand.
#include "kernels.h"
#include "launch_on_default.h"

namespace emulator_tests {
namespace {

using namespace hmi::cuda;

// parameter: floats between the lanes' elements.
__global__ void strided_read_kernel(float* output, const float* input, int stride) {
  output[threadIdx.x] = input[threadIdx.x * stride];
}

// Every lane reads 16 bytes.
__global__ void wide_copy_kernel(float* output, const float* input, int) {
  store16(output + 4 * threadIdx.x, load16(input + 4 * threadIdx.x));
}

// parameter: how many lanes take part.
__global__ void some_lanes_kernel(float* output, const float* input, int num_lanes) {
  if (static_cast<int>(threadIdx.x) < num_lanes) output[threadIdx.x] = input[threadIdx.x];
}

// Each block reads the same 128 bytes, parameter times.
__global__ void repeated_read_kernel(float* output, const float* input, int times) {
  float sum = 0.0f;
  for (int i = 0; i < times; ++i) sum += const_cast<const volatile float*>(input)[threadIdx.x];
  output[blockIdx.x * 32 + threadIdx.x] = sum;
}

__global__ void asynchronous_read_kernel(float* output, const float* input, int) {
  HMI_SHARED(float, units, [32][4]);
  cp_async16(units[threadIdx.x], input + 4 * threadIdx.x);
  cp_async_commit();
  cp_async_wait<0>();
  output[threadIdx.x] = units[threadIdx.x][0];
}

// Lane l writes the Word at l * stride words; parameter 0: all lanes the same one, which they then read.
template <class Word>
__global__ void strided_shared_kernel(float*, const float*, int stride) {
  HMI_DYNAMIC_SHARED(bytes);
  Word* const words = reinterpret_cast<Word*>(bytes);
  if (stride > 0) {
    words[threadIdx.x * stride] = Word{};
  } else {
    [[maybe_unused]] const volatile char* seen = reinterpret_cast<const volatile char*>(words);
    (void)*seen;
  }
}

// The rows of four 8x8 matrices, pitch bytes apart.
__global__ void matrix_rows_kernel(float*, const float*, int pitch) {
  HMI_DYNAMIC_SHARED(bytes);
  unsigned to[4];
  ldmatrix_x4(to, bytes + threadIdx.x * pitch);
}

// Eight rows of 64 bytes; lane l copies unit l % 4 of row l / 4, to where a row's turn puts it (parameter 1) or not.
__global__ void swizzled_rows_kernel(float*, const float* input, int is_swizzled) {
  HMI_DYNAMIC_SHARED(bytes);
  const int lane = threadIdx.x, row = lane % 8, unit = lane / 8;
  const int place = is_swizzled ? unit ^ (row / 2 % 4) : unit;
  cp_async16(bytes + row * 64 + place * 16, input + 4 * lane);
  cp_async_commit();
  cp_async_wait<0>();
}

// Accesses that no two lanes make in the same round: one wavefront each.
__global__ void uneven_rounds_kernel(float*, const float*, int) {
  HMI_DYNAMIC_SHARED(bytes);
  volatile float* const words = reinterpret_cast<volatile float*>(bytes);
  for (int round = 0; round < 4; ++round) {
    if (static_cast<int>(threadIdx.x) == round) words[0] = 1.0f;
    __syncwarp();
  }
}

template <void (*kernel)(float*, const float*, int), int kBlocks = 1>
void launch_warps(void* output, const void* input, int parameter) {
  launch(kernel, kBlocks, 32, 64 << 10, static_cast<float*>(output), static_cast<const float*>(input), parameter);
}

}  // namespace

std::vector<NamedKernel> traffic_kernels() {
  return {{"strided_read", &launch_warps<strided_read_kernel>},
          {"wide_copy", &launch_warps<wide_copy_kernel>},
          {"some_lanes", &launch_warps<some_lanes_kernel>},
          {"repeated_read", &launch_warps<repeated_read_kernel, 2>},
          {"asynchronous_read", &launch_warps<asynchronous_read_kernel>},
          {"strided_shared_2", &launch_warps<strided_shared_kernel<uint16_t>>},
          {"strided_shared_4", &launch_warps<strided_shared_kernel<float>>},
          {"strided_shared_8", &launch_warps<strided_shared_kernel<float2>>},
          {"strided_shared_16", &launch_warps<strided_shared_kernel<float4>>},
          {"matrix_rows", &launch_warps<matrix_rows_kernel>},
          {"swizzled_rows", &launch_warps<swizzled_rows_kernel>},
          {"uneven_rounds", &launch_warps<uneven_rounds_kernel>}};
}

}  // namespace emulator_tests
