// The emulated runtime's devices, versions and errors.
#include <cstring>
#include <stdexcept>
#include <utility>

#include "runtime_state.h"

namespace emulator {
namespace {

cudaError_t& last_error() {
  thread_local cudaError_t error = cudaSuccess;
  return error;
}

cudaStreamCaptureMode& capture_mode() {
  thread_local cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  return mode;
}

}  // namespace

cudaError_t injected_error(const std::string& function) {
  const Lock lock(runtime().mutex);
  const auto found = runtime().injected.find(function);
  if (found == runtime().injected.end()) return cudaSuccess;
  const cudaError_t error = found->second.second;
  if (--found->second.first == 0) runtime().injected.erase(found);
  return error;
}

void fail_next(const std::string& function, int count, cudaError_t error) {
  const Lock lock(runtime().mutex);
  if (count > 0) runtime().injected[function] = {count, error};
}

void clear_injected_errors() {
  const Lock lock(runtime().mutex);
  runtime().injected.clear();
}

cudaError_t enter(const char* function) { return injected_error(function); }

cudaError_t leave(cudaError_t error) {
  if (error != cudaSuccess) last_error() = error;
  return error;
}

cudaError_t enter_uncapturable(const char* function) {
  if (is_any_stream_capturing() && capture_mode() != cudaStreamCaptureModeRelaxed) {
    invalidate_captures();
    return cudaErrorStreamCaptureUnsupported;
  }
  return enter(function);
}

}  // namespace emulator

using namespace emulator;

cudaError_t cudaGetLastError() {
  return std::exchange(last_error(), cudaSuccess);
}

cudaError_t cudaPeekAtLastError() { return last_error(); }

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidResourceHandle: return "cudaErrorInvalidResourceHandle";
    case cudaErrorNotReady: return "cudaErrorNotReady";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
    case cudaErrorHostMemoryAlreadyRegistered: return "cudaErrorHostMemoryAlreadyRegistered";
    case cudaErrorHostMemoryNotRegistered: return "cudaErrorHostMemoryNotRegistered";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorCapturedEvent: return "cudaErrorCapturedEvent";
    default: return "cudaErrorUnknown";
  }
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the emulated CUDA runtime";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kNumDevices;
  return leave(enter(__func__));
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return leave(enter(__func__));
}

cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t error = enter(__func__)) return leave(error);
  if (device < 0 || device >= kNumDevices) return leave(cudaErrorInvalidDevice);
  current_device() = device;
  return cudaSuccess;
}

// An A100's.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (const cudaError_t error = enter(__func__)) return leave(error);
  if (device < 0 || device >= kNumDevices) return leave(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = 108; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 163 * 1024; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = 164 * 1024; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = 8; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; return cudaSuccess;
    case cudaDevAttrHostRegisterReadOnlySupported: *value = 1; return cudaSuccess;
    case cudaDevAttrCanUseHostPointerForRegisteredMem: *value = 1; return cudaSuccess;
    default: return leave(cudaErrorInvalidValue);
  }
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return leave(enter(__func__));
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return leave(enter(__func__));
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, capture_mode());
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  run_everything();
  return cudaSuccess;
}
