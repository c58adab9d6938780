// Page-locked host memory for common/block_pool.h: the device copies from it without the host's help and can read it in
// place.
#pragma once

#include "common/block_pool.h"

namespace hmi::cuda {

// cudaHostAlloc (portable: for all devices; mapped: readable by kernels) and cudaHostRegister. Throws CudaError.
const BlockAllocator& pinned_allocator();

}  // namespace hmi::cuda
