// The emulated runtime's streams, events and captured graphs.
#include <utility>

#include "runtime_state.h"

using namespace emulator;

namespace {

CUevent_st* find_event(cudaEvent_t handle) {
  for (const auto& event : runtime().events) {
    if (event.get() == handle && !event->is_destroyed) return handle;
  }
  report_problem("an event that does not exist (any more) was used");
  return nullptr;
}

// An event recorded in a capture belongs to the graph: nobody else can ask it anything.
cudaError_t check_queryable(const CUevent_st* event) {
  if (event == nullptr) return cudaErrorInvalidResourceHandle;
  return event->recorded_in_capture ? cudaErrorCapturedEvent : cudaSuccess;
}

}  // namespace

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  auto stream = std::make_unique<CUstream_st>();
  stream->device = current_device();
  stream->is_blocking = (flags & cudaStreamNonBlocking) == 0;
  *handle = stream.get();
  runtime().streams.push_back(std::move(stream));
  return cudaSuccess;
}

// What was submitted still runs.
cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  CUstream_st* const stream = find_stream(handle);
  if (stream == nullptr || handle == nullptr || handle == cudaStreamLegacy) return leave(cudaErrorInvalidResourceHandle);
  stream->is_destroyed = true;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  CUstream_st* const stream = find_stream(handle);
  if (stream == nullptr) return leave(cudaErrorInvalidResourceHandle);
  if (stream->last) run_until(stream->last);
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  CUstream_st* const stream = find_stream(handle);
  if (stream == nullptr) return leave(cudaErrorInvalidResourceHandle);
  if (!stream->last || stream->last->is_done) return cudaSuccess;
  step_towards(stream->last);
  return cudaErrorNotReady;
}

cudaError_t cudaStreamGetDevice(cudaStream_t handle, int* device) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  const CUstream_st* const stream = find_stream(handle);
  if (stream == nullptr) return leave(cudaErrorInvalidResourceHandle);
  *device = stream->device;
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  const CUstream_st* const stream = find_stream(handle);
  if (stream == nullptr) return leave(cudaErrorInvalidResourceHandle);
  *status = stream->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// A stream that has captured work of another stream in its past captures too.
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  CUstream_st* const stream = find_stream(handle);
  const CUevent_st* const event = find_event(event_handle);
  if (stream == nullptr || event == nullptr) return leave(cudaErrorInvalidResourceHandle);
  if (event->recorded_in_capture) {
    stream->capture = event->recorded_in_capture;
  } else if (stream->capture && event->recorded) {
    return leave(cudaErrorStreamCaptureIsolation);
  } else if (event->recorded) {
    enqueue(*stream, {nullptr, nullptr, {event->recorded}, {}});
  } else {
    ++runtime().num_waits_for_unrecorded_events;
  }
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  runtime().events.push_back(std::make_unique<CUevent_st>());
  *handle = runtime().events.back().get();
  (*handle)->device = current_device();
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  CUevent_st* const event = find_event(handle);
  if (event == nullptr) return leave(cudaErrorInvalidResourceHandle);
  event->is_destroyed = true;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t stream_handle) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  CUevent_st* const event = find_event(handle);
  CUstream_st* const stream = find_stream(stream_handle);
  if (event == nullptr || stream == nullptr) return leave(cudaErrorInvalidResourceHandle);
  if (event->device != stream->device) return leave(cudaErrorInvalidResourceHandle);
  event->recorded_in_capture = stream->capture;
  event->recorded = enqueue(*stream, {});
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t handle) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  const CUevent_st* const event = find_event(handle);
  if (const cudaError_t error = check_queryable(event)) return leave(error);
  if (!event->recorded || event->recorded->is_done) return cudaSuccess;
  step_towards(event->recorded);
  return cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter_uncapturable(__func__)) return leave(error);
  const CUevent_st* const event = find_event(handle);
  if (const cudaError_t error = check_queryable(event)) return leave(error);
  if (event->recorded) run_until(event->recorded);
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  CUstream_st* const stream = find_stream(handle);
  if (stream == nullptr) return leave(cudaErrorInvalidResourceHandle);
  const bool is_legacy = handle == nullptr || handle == cudaStreamLegacy;
  if (is_legacy || stream->capture) return leave(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<CUgraph_st>();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  CUstream_st* const origin = find_stream(handle);
  if (origin == nullptr) return leave(cudaErrorInvalidResourceHandle);
  const std::shared_ptr<CUgraph_st> captured = origin->capture;
  if (!captured) return leave(cudaErrorInvalidValue);
  for (const auto& stream : runtime().streams) {
    if (stream->capture == captured) stream->capture = nullptr;
  }
  if (captured->is_invalid) return leave(cudaErrorStreamCaptureInvalidated);
  *graph = captured.get();
  runtime().graphs[captured.get()] = captured;
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  if (runtime().graphs.count(graph) == 0) return leave(cudaErrorInvalidValue);
  runtime().executables.push_back(std::make_unique<CUgraphExec_st>(CUgraphExec_st{graph->works}));
  *executable = runtime().executables.back().get();
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  const Lock lock(runtime().mutex);
  if (const cudaError_t error = enter(__func__)) return leave(error);
  CUstream_st* const stream = find_stream(handle);
  if (stream == nullptr) return leave(cudaErrorInvalidResourceHandle);
  for (const auto& work : executable->works) enqueue(*stream, {work, nullptr, {}, {}});
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  const Lock lock(runtime().mutex);
  runtime().graphs.erase(graph);
  return leave(enter(__func__));
}

// Kept until the process ends: work of it may still be queued.
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return leave(enter(__func__)); }
