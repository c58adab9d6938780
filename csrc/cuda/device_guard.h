// The calling thread's current device, changed for a scope.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/error.h"

namespace hmi::cuda {

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    require("cudaGetDevice", cudaGetDevice(&previous_));
    if (device != previous_) require("cudaSetDevice", cudaSetDevice(device));
    device_ = device;
  }
  ~DeviceGuard() {
    if (device_ != previous_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  int device_ = 0;
};

}  // namespace hmi::cuda
