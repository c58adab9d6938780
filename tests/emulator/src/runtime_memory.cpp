// The emulated runtime's memory: who owns an address, and copies between kinds of memory as CUDA says they behave.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "runtime_state.h"

namespace emulator {

const Allocation* find_allocation(const void* address, size_t bytes, bool* fits) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  auto next = runtime().allocations.upper_bound(begin);
  *fits = true;
  if (next == runtime().allocations.begin()) return nullptr;
  const auto& [start, allocation] = *std::prev(next);
  if (begin >= start + allocation.bytes) return nullptr;
  *fits = begin + bytes <= start + allocation.bytes;
  return &allocation;
}

}  // namespace emulator

using namespace emulator;

namespace {

constexpr size_t kAlignment = 4096;
constexpr int kFreshMemory = 0xff;  // NaN as any float type

MemoryRange range_of(const void* address, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  return {begin, begin + bytes};
}

cudaError_t allocate(void** address, size_t bytes, MemoryKind kind) {
  if (bytes == 0) return cudaErrorInvalidValue;
  const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  *address = std::aligned_alloc(kAlignment, rounded);
  if (*address == nullptr) return cudaErrorMemoryAllocation;
  std::memset(*address, kFreshMemory, rounded);
  runtime().allocations[reinterpret_cast<uintptr_t>(*address)] = {bytes, kind, current_device()};
  return cudaSuccess;
}

// Takes an allocation of this kind out of the books.
cudaError_t forget(void* address, MemoryKind kind, const char* function) {
  const auto found = runtime().allocations.find(reinterpret_cast<uintptr_t>(address));
  if (found == runtime().allocations.end() || found->second.kind != kind) {
    report_problem(std::string(function) + " of memory that is not of its kind");
    return cudaErrorInvalidValue;
  }
  if (is_touched_by_queued_work(range_of(address, found->second.bytes))) {
    report_problem(std::string(function) + " of memory that a queued copy still reads or writes");
  }
  runtime().allocations.erase(found);
  return cudaSuccess;
}

struct Place {
  MemoryKind kind = MemoryKind::kPageable;
  bool fits = true;
  bool is_device() const { return kind == MemoryKind::kDevice; }
  bool is_pageable() const { return kind == MemoryKind::kPageable; }
};

Place place_of(const void* address, size_t bytes) {
  Place place;
  const Allocation* const allocation = find_allocation(address, bytes, &place.fits);
  if (allocation != nullptr) place.kind = allocation->kind;
  return place;
}

Operation copy_operation(void* destination, const void* source, size_t bytes) {
  return {[=] { std::memmove(destination, source, bytes); },
          nullptr,
          {},
          {range_of(destination, bytes), range_of(source, bytes)}};
}

// Pageable memory cannot be read by a device: it is staged before the call returns, and reached by the host only.
void copy_pageable(void* destination, const void* source, size_t bytes, const Place& from, CUstream_st& stream) {
  if (stream.last) run_until(stream.last);
  if (!from.is_pageable()) return run_until(enqueue(stream, copy_operation(destination, source, bytes)));
  const auto* const begin = static_cast<const char*>(source);
  enqueue(stream, {[destination, staged = std::string(begin, begin + bytes)] {
                     std::memcpy(destination, staged.data(), staged.size());
                   },
                   nullptr,
                   {},
                   {range_of(destination, bytes)}});
}

cudaError_t copy(void* destination, const void* source, size_t bytes, CUstream_st* stream) {
  if (stream == nullptr) return cudaErrorInvalidResourceHandle;
  const Place from = place_of(source, bytes), to = place_of(destination, bytes);
  if (!from.fits || !to.fits) return cudaErrorInvalidValue;
  const bool is_host_only = !from.is_device() && !to.is_device();
  if (stream->capture || (!is_host_only && !from.is_pageable() && !to.is_pageable())) {
    enqueue(*stream, copy_operation(destination, source, bytes));
  } else if (is_host_only) {  // synchronous for the host
    run_until(enqueue(*stream, copy_operation(destination, source, bytes)));
  } else {
    copy_pageable(destination, source, bytes, from, *stream);
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t cudaMalloc(void** address, size_t bytes) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  return leave(allocate(address, bytes, MemoryKind::kDevice));
}

// Waits for the device, as CUDA's does.
cudaError_t cudaFree(void* address) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  if (address == nullptr) return cudaSuccess;
  run_everything();
  if (const cudaError_t error = forget(address, MemoryKind::kDevice, __func__)) return leave(error);
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaHostAlloc(void** address, size_t bytes, unsigned) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  return leave(allocate(address, bytes, MemoryKind::kPinned));
}

// Does not wait for the device, though CUDA's may: nobody should rely on it.
cudaError_t cudaFreeHost(void* address) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  if (address == nullptr) return cudaSuccess;
  if (const cudaError_t error = forget(address, MemoryKind::kPinned, __func__)) return leave(error);
  run_everything();  // after the problem is told, so that the copy reads memory that is there
  std::free(address);
  return cudaSuccess;
}

cudaError_t cudaHostRegister(void* address, size_t bytes, unsigned) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  if (address == nullptr || bytes == 0) return leave(cudaErrorInvalidValue);
  const MemoryRange range = range_of(address, bytes);
  for (const auto& [begin, allocation] : runtime().allocations) {
    if (range.meets({begin, begin + allocation.bytes})) return leave(cudaErrorHostMemoryAlreadyRegistered);
  }
  runtime().allocations[range.begin] = {bytes, MemoryKind::kRegistered, current_device()};
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* address) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  const cudaError_t error = forget(address, MemoryKind::kRegistered, __func__);
  return leave(error == cudaSuccess ? error : cudaErrorHostMemoryNotRegistered);
}

cudaError_t cudaHostGetDevicePointer(void** device_pointer, void* address, unsigned) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  const Place place = place_of(address, 1);
  if (place.is_pageable() || place.is_device()) return leave(cudaErrorInvalidValue);
  *device_pointer = address;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* address) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  bool fits;
  const Allocation* const allocation = find_allocation(address, 0, &fits);
  *attributes = {};
  attributes->hostPointer = const_cast<void*>(address);
  if (allocation == nullptr) {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->device = -2;  // cudaInvalidDeviceId
    return cudaSuccess;
  }
  const bool is_device = allocation->kind == MemoryKind::kDevice;
  attributes->type = is_device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  attributes->device = allocation->device;
  attributes->devicePointer = const_cast<void*>(address);
  if (is_device) attributes->hostPointer = nullptr;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  return leave(copy(destination, source, bytes, find_stream(stream)));
}

// The copies of a batch come in no order among themselves, and sources are read when a copy runs.
cudaError_t cudaMemcpyBatchAsync(void* const* destinations, const void* const* sources, const size_t* sizes,
                                 size_t count, cudaMemcpyAttributes* attributes, size_t* first_of_attributes,
                                 size_t num_attributes, cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  CUstream_st* const stream = find_stream(handle);
  if (stream == nullptr) return leave(cudaErrorInvalidResourceHandle);
  if (handle == nullptr || handle == cudaStreamLegacy) return leave(cudaErrorInvalidValue);
  if (stream->capture) {
    invalidate_captures();
    return leave(cudaErrorStreamCaptureUnsupported);
  }
  if (count == 0 || num_attributes != 1 || first_of_attributes[0] != 0 ||
      attributes[0].srcAccessOrder != cudaMemcpySrcAccessOrderStream) {
    return leave(cudaErrorInvalidValue);
  }
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) {
    order[i] = i;
    if (sizes[i] == 0 || !place_of(sources[i], sizes[i]).fits || !place_of(destinations[i], sizes[i]).fits) {
      return leave(cudaErrorInvalidValue);
    }
  }
  std::shuffle(order.begin(), order.end(), runtime().random);
  for (const size_t i : order) enqueue(*stream, copy_operation(destinations[i], sources[i], sizes[i]));
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* address, int value, size_t bytes, cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  CUstream_st* const stream = find_stream(handle);
  if (stream == nullptr) return leave(cudaErrorInvalidResourceHandle);
  if (!place_of(address, bytes).fits) return leave(cudaErrorInvalidValue);
  enqueue(*stream, {[=] { std::memset(address, value, bytes); }, nullptr, {}, {range_of(address, bytes)}});
  return cudaSuccess;
}
