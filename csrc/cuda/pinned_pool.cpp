#include "cuda/pinned_pool.h"

#include <cuda_runtime_api.h>

#include "cuda/error.h"
#include "cuda/relaxed_capture.h"

namespace hmi::cuda {
namespace {

void* allocate(size_t bytes) {
  const RelaxedCapture relaxed;
  void* address = nullptr;
  require("cudaHostAlloc", cudaHostAlloc(&address, bytes, cudaHostAllocPortable | cudaHostAllocMapped));
  return address;
}

void register_memory(void* address, size_t bytes, bool is_read_only) {
  const RelaxedCapture relaxed;
  const unsigned access = is_read_only ? cudaHostRegisterReadOnly : 0;
  require("cudaHostRegister",
          cudaHostRegister(address, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped | access));
}

// Errors here come from elsewhere (an earlier kernel that failed, a driver that is gone): there is nothing to save.
void release(void* address) noexcept {
  const RelaxedCapture relaxed;
  if (cudaFreeHost(address) != cudaSuccess) cudaGetLastError();
}
void unregister_memory(void* address) noexcept {
  const RelaxedCapture relaxed;
  if (cudaHostUnregister(address) != cudaSuccess) cudaGetLastError();
}

}  // namespace

const BlockAllocator& pinned_allocator() {
  static const BlockAllocator allocator{&allocate, &release, &register_memory, &unregister_memory, true};
  return allocator;
}

}  // namespace hmi::cuda
