// While any stream is captured into a CUDA graph, calls that could wait for the device are refused and spoil the
// capture, in all threads. What this scope is for (asking an event of an uncaptured stream, page-locking memory) does no
// harm to a capture: the thread is allowed it.
#pragma once

#include <cuda_runtime_api.h>

namespace hmi::cuda {

class RelaxedCapture {
 public:
  RelaxedCapture() { exchange(); }
  ~RelaxedCapture() { exchange(); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  void exchange() {
    if (cudaThreadExchangeStreamCaptureMode(&mode_) != cudaSuccess) cudaGetLastError();
  }

  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace hmi::cuda
