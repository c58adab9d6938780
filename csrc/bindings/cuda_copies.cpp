// _C.cuda: page-locked pools, batches of copies, events.
#include <map>
#include <string>

#include "bindings/bindings.h"
#include "common/block_pool.h"
#include "cuda/copies.h"
#include "cuda/device_guard.h"
#include "cuda/error.h"
#include "cuda/event_pool.h"
#include "cuda/pinned_pool.h"

namespace hmi::bindings {
namespace {

using cuda::CopyMethod;

// Python has one type for these errors, whichever module they come from.
void translate_cuda_error(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const cuda::CudaError& error) {
    py::set_error(py::module_::import("hmi_kernels.errors").attr("CudaError"), error.what());
  }
}

cudaStream_t stream_of(Address handle) { return pointer<CUstream_st>(handle); }

CopyMethod method_named(const std::string& name) {
  static const std::map<std::string, CopyMethod> methods{{"auto", CopyMethod::kAuto},
                                                         {"loop", CopyMethod::kLoop},
                                                         {"batch", CopyMethod::kBatch},
                                                         {"kernel", CopyMethod::kKernel}};
  const auto found = methods.find(name);
  if (found == methods.end()) {
    throw std::invalid_argument("method must be auto, loop, batch or kernel, not " + name);
  }
  return found->second;
}

const char* name_of(CopyMethod method) {
  return method == CopyMethod::kLoop ? "loop" : method == CopyMethod::kBatch ? "batch" : "kernel";
}

// Returns the event of all copies, recorded on the stream, and the method that was taken.
std::pair<std::unique_ptr<cuda::Event>, std::string> copy_batch(const std::vector<Address>& destinations,
                                                                const std::vector<Address>& sources,
                                                                const std::vector<int64_t>& sizes,
                                                                const std::string& method_name, Address stream_handle) {
  const cudaStream_t stream = stream_of(stream_handle);
  CopyMethod method = method_named(method_name);
  const std::vector<Piece> pieces = make_pieces(destinations, sources, sizes);
  require_disjoint(pieces);
  const int device = cuda::require_stream_of_pieces(pieces, stream);
  const cuda::DeviceGuard guard(device);
  if (method == CopyMethod::kAuto) method = cuda::choose_copy_method(pieces, stream);
  auto event = std::make_unique<cuda::Event>();
  event->reserve(device);  // what can be wanting is asked for before anything starts
  cuda::copy_batch(pieces, method, stream);
  try {
    event->record(stream, device);
  } catch (...) {
    cuda::wait_after_failure(stream);  // without an event nobody keeps the tensors until the copies are done
    throw;
  }
  return {std::move(event), name_of(method)};
}

void record(cuda::Event& event, Address stream) {
  event.record(stream_of(stream), cuda::device_of_stream(stream_of(stream)));
}

void wait(const cuda::Event& event, Address stream) { event.wait(stream_of(stream)); }

bool is_capturing(Address stream) { return cuda::is_capturing(stream_of(stream)); }

}  // namespace

void define_cuda_copies(py::module_& m) {
  define_pool_types(m);
  py::register_exception_translator(&translate_cuda_error);
  py::class_<cuda::Event>(m, "Event")
      .def(py::init<>())
      .def("record", &record, py::arg("stream"), WithoutLock())
      .def("wait", &wait, py::arg("stream"), WithoutLock())
      .def("query", &cuda::Event::query, WithoutLock())
      .def("synchronize", &cuda::Event::synchronize, WithoutLock())
      .def_property_readonly("device", &cuda::Event::device);
  m.def("copy_batch", &copy_batch, py::arg("destinations"), py::arg("sources"), py::arg("sizes"), py::arg("method"),
        py::arg("stream"), WithoutLock());
  m.def("is_capturing", &is_capturing, py::arg("stream"), WithoutLock());
  m.def(
      "pinned_pool",
      [](size_t budget_bytes) { return std::make_shared<BlockPool>(budget_bytes, cuda::pinned_allocator()); },
      py::arg("budget_bytes"));
}

}  // namespace hmi::bindings
