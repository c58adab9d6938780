// What a kernel takes from the machine: shared memory, asynchronous copies, tensor cores, launches. The only file of
// csrc/cuda with PTX in it; tests/emulator/include/cuda/device.cuh gives the same names a meaning on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// Dynamic shared memory as bytes, aligned to 128: HMI_DYNAMIC_SHARED(bytes);
#define HMI_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
// A static array: HMI_SHARED(float, sums, [2][4]);
#define HMI_SHARED(type, name, ...) __shared__ type name __VA_ARGS__

namespace hmi::cuda {

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Starts a copy of 16 bytes to shared memory, past the first-level cache; zeros if not valid (the source is then not
// read). Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most kPending of this thread's groups are under way; other threads' copies need a barrier after it.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&to)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(shared))
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_transposed(unsigned (&to)[4], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(shared))
               : "memory");
}
// Two matrices; lanes 0..15 give the addresses.
__device__ __forceinline__ void ldmatrix_x2_transposed(unsigned (&to)[2], const void* shared) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(shared_address(shared))
               : "memory");
}

// The opposite of ldmatrix_x4: the same lanes hold the same elements and give the same addresses.
__device__ __forceinline__ void stmatrix_x4(void* shared, const unsigned (&from)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(shared_address(shared)),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
#else
  const unsigned lane = threadIdx.x % 32, own = shared_address(shared);
#pragma unroll
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const unsigned row = __shfl_sync(0xffffffffu, own, matrix * 8 + lane / 4);
    asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(row + lane % 4 * 4), "r"(from[matrix]) : "memory");
  }
#endif
}

// sums[16x8] += a[16x16] @ b[16x8], a row-major, b column-major; the layouts of PTX ISA "mma.m16n8k16".
template <class Element>
__device__ __forceinline__ void mma_m16n8k16(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  if constexpr (std::is_same_v<Element, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    static_assert(std::is_same_v<Element, __nv_bfloat16>);
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// 16 bytes of global memory that no one writes during the launch.
__device__ __forceinline__ uint4 load16(const void* global) { return __ldg(static_cast<const uint4*>(global)); }
// Likewise, but read once: it does not displace what the first-level cache holds. Works on pinned host memory too.
__device__ __forceinline__ uint4 load16_once(const void* global) {
  uint4 value;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(global));
  return value;
}
// Likewise, eight and four bytes.
__device__ __forceinline__ uint2 load8_once(const void* global) {
  uint2 value;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1}, [%2];\n" : "=r"(value.x), "=r"(value.y) : "l"(global));
  return value;
}
__device__ __forceinline__ unsigned load4_once(const void* global) {
  unsigned value;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];\n" : "=r"(value) : "l"(global));
  return value;
}
// Eight bytes and one, which others read too.
__device__ __forceinline__ uint2 load8(const void* global) { return __ldg(static_cast<const uint2*>(global)); }
__device__ __forceinline__ unsigned load_byte(const void* global) {
  return __ldg(static_cast<const unsigned char*>(global));
}
// 16 bytes of global memory that this thread alone writes, later in the launch.
__device__ __forceinline__ uint4 load16_changing(const void* global) { return *static_cast<const uint4*>(global); }
__device__ __forceinline__ void store16(void* global, const uint4& value) { *static_cast<uint4*>(global) = value; }

// Says that an argument's value is out of bounds (see fault.h). Any thread may; one of them is heard.
__device__ __forceinline__ void report_fault(unsigned long long* fault, unsigned long long what) {
  if (fault != nullptr) *static_cast<volatile unsigned long long*>(fault) = what;
}

// Launches on the stream; returns the launch's error and clears it. An empty grid is no error.
template <class... Parameters, class... Arguments>
inline cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                          cudaStream_t stream, Arguments&&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return cudaSuccess;
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

}  // namespace hmi::cuda
