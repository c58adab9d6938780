#include "runtime_bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>

#include "emulator/streams.h"
#include "runtime_state.h"

namespace py = pybind11;

namespace emulator {
namespace {

using Address = uintptr_t;
using WithoutLock = py::call_guard<py::gil_scoped_release>;

cudaStream_t stream_of(Address handle) { return reinterpret_cast<cudaStream_t>(handle); }

void require(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
}

// What a test allocates on an emulated device; a Python buffer, so that torch can make a tensor of it.
class DeviceMemory {
 public:
  DeviceMemory(size_t bytes, int device) : bytes_(bytes) {
    require(cudaSetDevice(device));
    require(cudaMalloc(&address_, bytes));
    require(cudaSetDevice(0));
  }
  ~DeviceMemory() { cudaFree(address_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  py::buffer_info bytes() { return {static_cast<unsigned char*>(address_), static_cast<py::ssize_t>(bytes_), false}; }

 private:
  void* address_ = nullptr;
  size_t bytes_;
};

StreamOrder order_named(const std::string& name) {
  if (name == "immediate") return StreamOrder::kImmediate;
  if (name == "random") return StreamOrder::kRandom;
  if (name == "latest") return StreamOrder::kLatest;
  throw std::invalid_argument("order must be immediate, random or latest, not " + name);
}

Address create_stream(int device, bool is_blocking) {
  cudaStream_t stream = nullptr;
  require(cudaSetDevice(device));
  require(cudaStreamCreateWithFlags(&stream, is_blocking ? cudaStreamDefault : cudaStreamNonBlocking));
  require(cudaSetDevice(0));
  return reinterpret_cast<Address>(stream);
}

// A kernel written in Python. Shared by the copies of the work, and freed with the interpreter's lock held.
void submit_call(Address stream, py::function function) {
  const std::shared_ptr<py::function> shared(new py::function(std::move(function)), [](py::function* pointer) {
    const py::gil_scoped_acquire lock;
    delete pointer;
  });
  const py::gil_scoped_release release;
  submit(stream_of(stream), [shared] {
    const py::gil_scoped_acquire lock;
    (*shared)();
  });
}

void wait_for_unrecorded_event(Address stream) {
  cudaEvent_t event = nullptr;
  require(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  require(cudaStreamWaitEvent(stream_of(stream), event, 0));
  require(cudaEventDestroy(event));
}

void begin_capture(Address stream) { require(cudaStreamBeginCapture(stream_of(stream), cudaStreamCaptureModeGlobal)); }

// Returns the executable graph.
Address end_capture(Address stream) {
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  require(cudaStreamEndCapture(stream_of(stream), &graph));
  require(cudaGraphInstantiate(&executable, graph, 0));
  require(cudaGraphDestroy(graph));
  return reinterpret_cast<Address>(executable);
}

void launch_graph(Address executable, Address stream) {
  require(cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(executable), stream_of(stream)));
}

}  // namespace

void define_runtime(py::module_& m) {
  py::class_<DeviceMemory>(m, "DeviceMemory", py::buffer_protocol(),
                           py::release_gil_before_calling_cpp_dtor())
      .def(py::init<size_t, int>(), py::arg("bytes"), py::arg("device"), WithoutLock())
      .def_buffer(&DeviceMemory::bytes);
  m.def("set_stream_order", [](const std::string& order, uint64_t seed) { set_stream_order(order_named(order), seed); },
        py::arg("order"), py::arg("seed"), WithoutLock());
  m.def("fail_next",
        [](const std::string& function, int count, int error) {
          fail_next(function, count, static_cast<cudaError_t>(error));
        },
        py::arg("function"), py::arg("count"), py::arg("error"), WithoutLock());
  m.def("clear_injected_errors", &clear_injected_errors, WithoutLock());
  m.def("run_everything", &run_everything, WithoutLock());
  m.def("take_problems", &take_problems, WithoutLock());
  m.def("num_waits_for_unrecorded_events", &num_waits_for_unrecorded_events, WithoutLock());
  m.def("create_stream", &create_stream, py::arg("device"), py::arg("is_blocking"), WithoutLock());
  m.def("destroy_stream", [](Address stream) { require(cudaStreamDestroy(stream_of(stream))); }, py::arg("stream"),
        WithoutLock());
  m.def("synchronize", [](Address stream) { require(cudaStreamSynchronize(stream_of(stream))); }, py::arg("stream"),
        WithoutLock());
  m.def("is_idle", [](Address stream) { return cudaStreamQuery(stream_of(stream)) == cudaSuccess; }, py::arg("stream"),
        WithoutLock());
  m.def("submit", &submit_call, py::arg("stream"), py::arg("function"));
  m.def("wait_for_unrecorded_event", &wait_for_unrecorded_event, py::arg("stream"), WithoutLock());
  m.def("begin_capture", &begin_capture, py::arg("stream"), WithoutLock());
  m.def("end_capture", &end_capture, py::arg("stream"), WithoutLock());
  m.def("launch_graph", &launch_graph, py::arg("executable"), py::arg("stream"), WithoutLock());
  m.def("last_error", [] { return static_cast<int>(cudaGetLastError()); }, WithoutLock());
}

}  // namespace emulator
