// Batches of copies to, from and within the device: many disjoint pieces, one call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "common/pieces.h"

namespace hmi::cuda {

// How a batch is carried out.
enum class CopyMethod : int32_t {
  kAuto,    // one of the others, by copy_batch.cu's table
  kLoop,    // cudaMemcpyAsync for each piece: works everywhere
  kBatch,   // one cudaMemcpyBatchAsync: needs CUDA 12.8, a stream that is neither the legacy default nor capturing
  kKernel,  // a kernel that reads device memory and page-locked host memory in place, and writes device memory
};

// The device that the pieces lie on, or the current one if all are in host memory. Throws std::invalid_argument if the
// stream is another device's.
int require_stream_of_pieces(const std::vector<Piece>& pieces, cudaStream_t stream);

// The stream's device; the current device for the default streams.
int device_of_stream(cudaStream_t stream);

// Whether the stream is being captured into a graph; the legacy default stream cannot be.
bool is_capturing(cudaStream_t stream);

// What kAuto stands for. Never kAuto.
CopyMethod choose_copy_method(const std::vector<Piece>& pieces, cudaStream_t stream);

// Starts all copies on the stream, a stream of the current device. Sources must stay as they are until the stream is
// past them. Throws std::invalid_argument, with nothing started, if the method cannot do it; and CudaError, after it
// has waited for the copies that it did start.
void copy_batch(const std::vector<Piece>& pieces, CopyMethod method, cudaStream_t stream);

// Waits for what was started on the stream before something failed: the caller will free what it reads and writes.
void wait_after_failure(cudaStream_t stream);

}  // namespace hmi::cuda
