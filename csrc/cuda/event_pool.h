// Events that say how far a stream has come. They are reused: to create one takes as long as a small copy.
#pragma once

#include <cuda_runtime_api.h>

namespace hmi::cuda {

// A place in a stream, or none before the first record(). All functions throw CudaError.
class Event {
 public:
  Event() = default;
  ~Event();
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  // Makes sure that record() on a stream of the device finds an event. Until then this one is none.
  void reserve(int device);
  // From now on this event is the stream's work up to here. device: the stream's.
  void record(cudaStream_t stream, int device);
  // Work that is submitted to the stream later waits for this event; the host does not. Nothing without a record().
  void wait(cudaStream_t stream) const;
  // Whether the work is done; true without a record().
  bool query() const;
  // The host waits.
  void synchronize() const;

  int device() const { return device_; }  // -1 without a record()

 private:
  void give_back();

  cudaEvent_t handle_ = nullptr;
  int device_ = -1;
};

}  // namespace hmi::cuda
