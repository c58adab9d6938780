#include "emulator/streams.h"

#include <stdexcept>
#include <utility>

#include "runtime_state.h"

namespace emulator {
namespace {

bool may_run(const CUstream_st& stream) {
  if (stream.queue.empty()) return false;
  for (const MarkerPointer& marker : stream.queue.front().after) {
    if (!marker->is_done) return false;
  }
  return true;
}

void run_next_of(CUstream_st& stream) {
  Operation operation = std::move(stream.queue.front());
  stream.queue.pop_front();
  operation.marker->is_done = true;  // also if it throws: what follows must not wait for ever
  if (operation.work) operation.work();
}

// False if there was nothing to run.
bool run_any() {
  std::vector<CUstream_st*> candidates;
  for (const auto& stream : runtime().streams) {
    if (may_run(*stream)) candidates.push_back(stream.get());
  }
  if (candidates.empty()) return false;
  run_next_of(*candidates[runtime().random() % candidates.size()]);
  return true;
}

// Prerequisites were always submitted earlier, so this ends.
void run_one_needed_by(const MarkerPointer& marker) {
  CUstream_st& stream = *marker->stream;
  for (const MarkerPointer& earlier : stream.queue.front().after) {
    if (!earlier->is_done) return run_one_needed_by(earlier);
  }
  run_next_of(stream);
}

bool is_legacy(const CUstream_st& stream) { return &stream == runtime().streams[stream.device].get(); }

// The legacy default stream waits for all blocking streams of its device, and they for it.
void add_implicit_order(const CUstream_st& stream, std::vector<MarkerPointer>& after) {
  if (!stream.is_blocking) return;
  for (const auto& other : runtime().streams) {
    const bool is_ordered = other->device == stream.device && other->is_blocking && other.get() != &stream &&
                            (is_legacy(stream) || is_legacy(*other));
    if (is_ordered && other->last && !other->last->is_done) after.push_back(other->last);
  }
}

}  // namespace

Runtime& runtime() {
  static Runtime* const instance = [] {
    auto* made = new Runtime;  // never destroyed: the interpreter may free pinned memory after static destructors
    for (int device = 0; device < kNumDevices; ++device) {
      made->streams.push_back(std::make_unique<CUstream_st>());
      made->streams.back()->device = device;
    }
    return made;
  }();
  return *instance;
}

int& current_device() {
  thread_local int device = 0;
  return device;
}

CUstream_st* find_stream(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) return runtime().streams[current_device()].get();
  for (const auto& stream : runtime().streams) {
    if (stream.get() != handle) continue;
    if (!stream->is_destroyed) return handle;
    report_problem("a destroyed stream was used");
    return nullptr;
  }
  report_problem("something that is no stream was used as one");
  return nullptr;
}

MarkerPointer enqueue(CUstream_st& stream, Operation operation) {
  operation.marker = std::make_shared<Marker>(Marker{&stream});
  const MarkerPointer marker = operation.marker;
  if (stream.capture) {
    if (operation.work) stream.capture->works.push_back(std::move(operation.work));
    return marker;
  }
  add_implicit_order(stream, operation.after);
  stream.queue.push_back(std::move(operation));
  stream.last = marker;
  if (runtime().order == StreamOrder::kImmediate) {
    run_until(marker);
  } else if (runtime().order == StreamOrder::kRandom && runtime().random() % 4 == 0) {
    run_any();  // a device does not wait until somebody waits for it
  }
  return marker;
}

void run_until(const MarkerPointer& marker) {
  while (!marker->is_done) {
    if (runtime().order != StreamOrder::kRandom) {
      run_one_needed_by(marker);
    } else if (!run_any()) {
      throw std::logic_error("the emulated streams wait for each other");
    }
  }
}

void step_towards(const MarkerPointer& marker) {
  if (!marker->is_done) run_one_needed_by(marker);
}

void submit(cudaStream_t handle, std::function<void()> work) {
  const Lock lock(runtime().mutex);
  CUstream_st* const stream = find_stream(handle);
  if (stream == nullptr) throw std::runtime_error("work was submitted to a stream that does not exist (any more)");
  enqueue(*stream, {std::move(work), nullptr, {}, {}});
}

void run_everything() {
  const Lock lock(runtime().mutex);
  while (run_any()) {
  }
}

void set_stream_order(StreamOrder order, uint64_t seed) {
  const Lock lock(runtime().mutex);
  run_everything();
  runtime().order = order;
  runtime().random.seed(seed);
}

bool is_any_stream_capturing() {
  for (const auto& stream : runtime().streams) {
    if (stream->capture) return true;
  }
  return false;
}

void invalidate_captures() {
  for (const auto& stream : runtime().streams) {
    if (stream->capture) stream->capture->is_invalid = true;
  }
}

bool is_touched_by_queued_work(const MemoryRange& range) {
  for (const auto& stream : runtime().streams) {
    for (const Operation& operation : stream->queue) {
      for (const MemoryRange& touched : operation.touched) {
        if (touched.meets(range)) return true;
      }
    }
  }
  return false;
}

void report_problem(const std::string& what) {
  const Lock lock(runtime().mutex);
  runtime().problems.push_back(what);
}

std::vector<std::string> take_problems() {
  const Lock lock(runtime().mutex);
  return std::exchange(runtime().problems, {});
}

int64_t num_waits_for_unrecorded_events() {
  const Lock lock(runtime().mutex);
  return runtime().num_waits_for_unrecorded_events;
}

}  // namespace emulator
