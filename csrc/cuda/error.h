// Errors of the CUDA runtime as exceptions that name the call.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace hmi::cuda {

class CudaError : public std::runtime_error {
 public:
  CudaError(const char* call, cudaError_t code)
      : std::runtime_error(std::string(call) + " failed: " + cudaGetErrorName(code) + " (" +
                           std::to_string(static_cast<int>(code)) + "): " + cudaGetErrorString(code)),
        code_(code) {}

  cudaError_t code() const { return code_; }

 private:
  cudaError_t code_;
};

// Throws CudaError unless the call succeeded. Takes the error out of the runtime's memory of the last one, where the
// next launch would find it.
inline void require(const char* call, cudaError_t code) {
  if (code == cudaSuccess) return;
  cudaGetLastError();
  throw CudaError(call, code);
}

}  // namespace hmi::cuda
