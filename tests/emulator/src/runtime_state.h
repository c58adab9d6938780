// What the emulated runtime remembers. Guarded by one lock, which is also held while work runs.
#pragma once

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "emulator/streams.h"

namespace emulator {

constexpr int kNumDevices = 2;

// A place in a stream: done when all that was submitted before it, and itself, has run.
struct Marker {
  CUstream_st* stream;
  bool is_done = false;
};
using MarkerPointer = std::shared_ptr<Marker>;

struct MemoryRange {
  uintptr_t begin;
  uintptr_t end;
  bool meets(const MemoryRange& other) const { return begin < other.end && other.begin < end; }
};

struct Operation {
  std::function<void()> work;  // may be empty
  MarkerPointer marker;
  std::vector<MarkerPointer> after;  // places in other streams that come first
  std::vector<MemoryRange> touched;  // memory that must not be freed before
};

enum class MemoryKind { kPageable, kPinned, kRegistered, kDevice };

struct Allocation {
  size_t bytes;
  MemoryKind kind;
  int device;
};

}  // namespace emulator

// The types behind CUDA's handles. Destroyed ones are kept, so that their use is noticed.
struct CUgraph_st {
  std::vector<std::function<void()>> works;  // in the order of capture, which respects all dependencies
  bool is_invalid = false;
};

struct CUgraphExec_st {
  std::vector<std::function<void()>> works;
};

struct CUstream_st {
  int device = 0;
  bool is_blocking = true;  // takes part in the legacy default stream's implicit order
  bool is_destroyed = false;
  std::deque<emulator::Operation> queue;
  emulator::MarkerPointer last;  // of the newest operation, also if it has run
  std::shared_ptr<CUgraph_st> capture;  // not null while capturing
};

struct CUevent_st {
  int device = 0;
  bool is_destroyed = false;
  emulator::MarkerPointer recorded;               // null: never recorded
  std::shared_ptr<CUgraph_st> recorded_in_capture;
};

namespace emulator {

struct Runtime {
  std::recursive_mutex mutex;
  StreamOrder order = StreamOrder::kImmediate;
  std::mt19937_64 random{0};
  std::vector<std::unique_ptr<CUstream_st>> streams;  // the first kNumDevices are the legacy default streams
  std::vector<std::unique_ptr<CUevent_st>> events;
  std::vector<std::unique_ptr<CUgraphExec_st>> executables;
  std::map<CUgraph_st*, std::shared_ptr<CUgraph_st>> graphs;
  std::map<uintptr_t, Allocation> allocations;
  std::map<std::string, std::pair<int, cudaError_t>> injected;
  std::vector<std::string> problems;
  int64_t num_waits_for_unrecorded_events = 0;
};

Runtime& runtime();
using Lock = std::lock_guard<std::recursive_mutex>;

// The device that the calling thread made current.
int& current_device();

// The stream behind a handle, default streams included; null, and a problem reported, if it is destroyed or unknown.
CUstream_st* find_stream(cudaStream_t handle);

// Adds an operation, or captures it. Its marker is made here.
MarkerPointer enqueue(CUstream_st& stream, Operation operation);
// Runs at least what the marker needs.
void run_until(const MarkerPointer& marker);
// Runs at most one operation that the marker needs.
void step_towards(const MarkerPointer& marker);

bool is_any_stream_capturing();
void invalidate_captures();

// What lies at the address; bytes == 0 asks for the address alone. *fits: all bytes lie in the one allocation.
const Allocation* find_allocation(const void* address, size_t bytes, bool* fits);
// Whether queued copies still touch the range.
bool is_touched_by_queued_work(const MemoryRange& range);

// At the head and at the end of every emulated function: injected errors, and the thread's last error.
cudaError_t enter(const char* function);
cudaError_t leave(cudaError_t error);
// The like for functions that may not be called while a stream captures: they spoil the capture.
cudaError_t enter_uncapturable(const char* function);

}  // namespace emulator
