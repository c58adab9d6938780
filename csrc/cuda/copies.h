// Page-locked host memory, batches of copies to the device, and events that say when they are done.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

namespace hmi::cuda {

// One disjoint piece of a batch.
struct Piece {
  void* destination;
  const void* source;
  int64_t bytes;
};

// How a batch is carried out; kAuto chooses by what the driver has and by the pieces' sizes (copy_batch.cu's table).
enum class CopyMethod : int32_t { kAuto, kLoop, kBatch, kKernel };

// Starts all copies on the stream and returns; sources must stay as they are until the stream is past them. kKernel
// reads page-locked host memory in place. Throws CudaError.
void copy_batch(const std::vector<Piece>& pieces, CopyMethod method, cudaStream_t stream);

// What kAuto would choose.
CopyMethod choose_copy_method(const std::vector<Piece>& pieces, bool is_capturing);

}  // namespace hmi::cuda
