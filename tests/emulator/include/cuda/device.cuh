// csrc/cuda/device.cuh for the CPU: the same names, with a meaning that g++ compiles. It is found in place of the real
// one because this folder comes first on the include path.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "emulator/async_copy.h"
#include "emulator/global_memory.h"
#include "emulator/intrinsics.h"
#include "emulator/shared_memory.h"
#include "emulator/tensor_core.h"

// The toolkit's headers make these nothing for a host compiler, so that a mistake in them would go unseen.
#undef __shared__
#define __shared__ use_HMI_SHARED_instead_of_plain_shared
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__

#define HMI_DYNAMIC_SHARED(name) unsigned char* const name = ::emulator::dynamic_shared()
#define HMI_SHARED(type, name, ...)                                    \
  static ::emulator::SharedVariable<type __VA_ARGS__> name##_variable; \
  auto& name = name##_variable.use()

namespace hmi::cuda {

using emulator::Place;

inline void cp_async16(void* shared, const void* global, bool valid = true, Place place = Place::here()) {
  emulator::start_copy(shared, global, valid, place);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait(Place place = Place::here()) {
  emulator::wait_copies(kPending, place);
}

inline void ldmatrix_x4(unsigned (&to)[4], const void* shared, Place place = Place::here()) {
  emulator::load_matrices(to, 4, false, shared, place);
}
inline void ldmatrix_x4_transposed(unsigned (&to)[4], const void* shared, Place place = Place::here()) {
  emulator::load_matrices(to, 4, true, shared, place);
}
inline void ldmatrix_x2_transposed(unsigned (&to)[2], const void* shared, Place place = Place::here()) {
  emulator::load_matrices(to, 2, true, shared, place);
}

inline void stmatrix_x4(void* shared, const unsigned (&from)[4], Place place = Place::here()) {
  const unsigned lane = threadIdx.x % 32;
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    unsigned char* row = __shfl_sync(0xffffffffu, static_cast<unsigned char*>(shared), matrix * 8 + lane / 4, 32, place);
    *reinterpret_cast<unsigned*>(row + lane % 4 * 4) = from[matrix];
  }
}

template <class Element>
void mma_m16n8k16(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], Place place = Place::here()) {
  if constexpr (std::is_same_v<Element, __half>) {
    emulator::mma_float16(sums, a, b, place);
  } else {
    static_assert(std::is_same_v<Element, __nv_bfloat16>);
    emulator::mma_bfloat16(sums, a, b, place);
  }
}

inline uint4 load16(const void* global, Place place = Place::here()) {
  return emulator::load16_constant(global, place);
}
inline uint4 load16_once(const void* global, Place place = Place::here()) {
  return emulator::load16_constant(global, place);
}
inline uint2 load8_once(const void* global, Place place = Place::here()) {
  return emulator::load8_constant(global, place);
}
inline unsigned load4_once(const void* global, Place place = Place::here()) {
  return emulator::load4_constant(global, place);
}
inline uint2 load8(const void* global, Place place = Place::here()) { return emulator::load8_constant(global, place); }
inline unsigned load_byte(const void* global, Place place = Place::here()) {
  return emulator::load1_constant(global, place);
}
inline uint4 load16_changing(const void* global, Place place = Place::here()) {
  return emulator::load16(global, place);
}
inline void store16(void* global, const uint4& value, Place place = Place::here()) {
  emulator::store16(global, value, place);
}

// Threads may write different faults at the same time: the one race that is meant.
EMULATOR_UNOBSERVED inline void report_fault(unsigned long long* fault, unsigned long long what) {
  if (fault != nullptr) *fault = what;
}

template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  std::tuple<Parameters...> parameters(static_cast<Parameters>(arguments)...);
  emulator::Grid work{grid, block, shared_bytes, reinterpret_cast<const void*>(kernel), [kernel, parameters] {
                        emulator::call(kernel, parameters, std::index_sequence_for<Parameters...>());
                      }};
  emulator::require_launchable(work, (sizeof(Parameters) + ... + 0));
  if (const cudaError_t error = emulator::injected_error("cudaLaunchKernel"); error != cudaSuccess) return error;
  emulator::submit(stream, [work = std::move(work)] { emulator::run_grid(work); });
  return cudaSuccess;
}

}  // namespace hmi::cuda
