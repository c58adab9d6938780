// Products through ldmatrix and mma.
#include "kernels.h"
#include "launch_on_default.h"

namespace emulator_tests {
namespace {

using namespace hmi::cuda;

constexpr int kPitch = 24;  // elements of a row in shared memory: rows stay 16-byte aligned

// output[16, 16] = a[16, 16] @ b[16, 16], row-major; input is a, then b. The right operand comes through
// ldmatrix_x4_transposed (parameter 0) or by ldmatrix_x2_transposed, one half of its columns at a time (1).
template <class Element>
__global__ void multiply_kernel(float* output, const Element* input, int by_halves) {
  HMI_SHARED(Element, a, [16 * kPitch]);
  HMI_SHARED(Element, b, [16 * kPitch]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    a[i / 16 * kPitch + i % 16] = input[i];
    b[i / 16 * kPitch + i % 16] = input[256 + i];
  }
  __syncwarp();
  unsigned left[4], right[2][2];
  ldmatrix_x4(left, a + lane % 16 * kPitch + lane / 16 * 8);
  if (by_halves) {
    for (int half = 0; half < 2; ++half) ldmatrix_x2_transposed(right[half], b + lane % 16 * kPitch + half * 8);
  } else {
    unsigned all[4];
    ldmatrix_x4_transposed(all, b + lane % 16 * kPitch + lane / 16 * 8);
    for (int i = 0; i < 4; ++i) right[i / 2][i % 2] = all[i];
  }
  for (int half = 0; half < 2; ++half) {
    float sums[4] = {};
    mma_m16n8k16<Element>(sums, left, right[half]);
    mma_m16n8k16<Element>(sums, left, right[half]);  // adds up: twice the product
    for (int i = 0; i < 4; ++i) {
      output[(lane / 4 + 8 * (i / 2)) * 16 + half * 8 + lane % 4 * 2 + i % 2] = sums[i];
    }
  }
}

__global__ void misaligned_matrix_kernel(float*, const float*, int bytes_off) {
  HMI_SHARED(unsigned char, bytes, [1024]);
  unsigned to[4];
  ldmatrix_x4(to, bytes + 16 * threadIdx.x + bytes_off);
}

__global__ void matrix_in_global_kernel(float*, const float* input, int) {
  unsigned to[4];
  ldmatrix_x4(to, input);
}

template <class Element>
void launch_multiply(void* output, const void* input, int by_halves) {
  launch(&multiply_kernel<Element>, 1, 32, 0, static_cast<float*>(output), static_cast<const Element*>(input),
         by_halves);
}

template <void (*kernel)(float*, const float*, int)>
void launch_warp(void* output, const void* input, int parameter) {
  launch(kernel, 1, 32, 0, static_cast<float*>(output), static_cast<const float*>(input), parameter);
}

}  // namespace

std::vector<NamedKernel> tensor_core_kernels() {
  return {{"multiply_float16", &launch_multiply<__half>},
          {"multiply_bfloat16", &launch_multiply<__nv_bfloat16>},
          {"misaligned_matrix", &launch_warp<misaligned_matrix_kernel>},
          {"matrix_in_global", &launch_warp<matrix_in_global_kernel>}};
}

}  // namespace emulator_tests
