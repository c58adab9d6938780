#include "cuda/event_pool.h"

#include <map>
#include <mutex>
#include <vector>

#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/relaxed_capture.h"

namespace hmi::cuda {
namespace {

struct Pool {
  std::mutex mutex;
  std::map<int, std::vector<cudaEvent_t>> free;  // by device
};

// Never destroyed: the driver may be gone by then, and takes its events along.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

cudaEvent_t take(int device) {
  {
    const std::lock_guard<std::mutex> lock(pool().mutex);
    std::vector<cudaEvent_t>& free = pool().free[device];
    if (!free.empty()) {
      const cudaEvent_t event = free.back();
      free.pop_back();
      return event;
    }
  }
  const DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  cudaEvent_t event = nullptr;
  require("cudaEventCreateWithFlags", cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

}  // namespace

Event::~Event() { give_back(); }

// A stream that waits for the event waits for what was recorded when it was told to: the event may be recorded anew.
void Event::give_back() {
  if (handle_ == nullptr) return;
  const std::lock_guard<std::mutex> lock(pool().mutex);
  pool().free[device_].push_back(handle_);
  handle_ = nullptr;
}

void Event::reserve(int device) {
  if (handle_ != nullptr && device == device_) return;
  give_back();
  handle_ = take(device);
  device_ = device;
}

void Event::record(cudaStream_t stream, int device) {
  reserve(device);
  const DeviceGuard guard(device);
  require("cudaEventRecord", cudaEventRecord(handle_, stream));
}

void Event::wait(cudaStream_t stream) const {
  if (handle_ != nullptr) require("cudaStreamWaitEvent", cudaStreamWaitEvent(stream, handle_, 0));
}

bool Event::query() const {
  if (handle_ == nullptr) return true;
  const RelaxedCapture relaxed;
  const cudaError_t error = cudaEventQuery(handle_);
  if (error != cudaErrorNotReady) {
    require("cudaEventQuery", error);
    return true;
  }
  cudaGetLastError();  // no error, but remembered as one
  return false;
}

void Event::synchronize() const {
  if (handle_ != nullptr) require("cudaEventSynchronize", cudaEventSynchronize(handle_));
}

}  // namespace hmi::cuda
