// _C.cuda: its parts, and what every op needs of the device.
#include <cuda_runtime_api.h>

#include "bindings/bindings.h"
#include "cuda/error.h"
#include "cuda/relaxed_capture.h"

namespace hmi::bindings {
namespace {

// (address for the host, address for the device) of the device's fault word, see cuda/fault.h. Never freed: kernels
// may still write to it when the interpreter ends.
std::pair<Address, Address> allocate_fault_word() {
  const cuda::RelaxedCapture relaxed;
  void* word = nullptr;
  void* device_word = nullptr;
  cuda::require("cudaHostAlloc", cudaHostAlloc(&word, sizeof(unsigned long long), cudaHostAllocMapped));
  *static_cast<unsigned long long*>(word) = 0;
  cuda::require("cudaHostGetDevicePointer", cudaHostGetDevicePointer(&device_word, word, 0));
  return {reinterpret_cast<Address>(word), reinterpret_cast<Address>(device_word)};
}

// 0 if there is no driver: a question that must not fail.
std::pair<int, int> versions() {
  int driver = 0, runtime = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  if (cudaRuntimeGetVersion(&runtime) != cudaSuccess) runtime = 0;
  return {driver, runtime};
}

int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  cuda::require("cudaDeviceGetAttribute", cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

std::pair<int, int> compute_capability(int device) {
  return {device_attribute(cudaDevAttrComputeCapabilityMajor, device),
          device_attribute(cudaDevAttrComputeCapabilityMinor, device)};
}

// Bytes that one block may have.
int max_shared_bytes(int device) { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device); }

}  // namespace

void define_cuda(py::module_& m) {
  m.def("versions", &versions);
  m.def("allocate_fault_word", &allocate_fault_word);
  m.def("compute_capability", &compute_capability, py::arg("device"));
  m.def("max_shared_bytes", &max_shared_bytes, py::arg("device"));
  define_cuda_copies(m);
  define_cuda_adapters(m);
  define_cuda_products(m);
  define_cuda_plot(m);
}

}  // namespace hmi::bindings
