// Pools of host memory and copies within it. The pools' blocks are
// Python buffers, over which torch makes tensors without a copy.
#include "common/block_pool.h"

#include "bindings/bindings.h"
#include "common/pieces.h"

namespace hmi::bindings {
namespace {

// Python has one type for each error, whichever module the pool comes from.
void raise_as(const char* type, const std::exception& error) {
  py::set_error(py::module_::import("hmi_kernels.errors").attr(type), error.what());
}

void translate_pool_error(std::exception_ptr thrown) {
  try {
    if (thrown) std::rethrow_exception(thrown);
  } catch (const PoolClosed& error) {
    raise_as("PoolClosedError", error);
  } catch (const PoolExhausted& error) {
    raise_as("PoolExhaustedError", error);
  }
}

py::buffer_info bytes_of(const Block& block) {
  return {static_cast<unsigned char*>(block.address()), static_cast<py::ssize_t>(block.bytes()), false};
}

void enlist(BlockPool& pool, Address address, size_t bytes, bool is_read_only) {
  pool.enlist(pointer<void>(address), bytes, is_read_only);
}

void copy_pieces(const std::vector<Address>& destinations, const std::vector<Address>& sources,
                 const std::vector<int64_t>& sizes) {
  const std::vector<Piece> pieces = make_pieces(destinations, sources, sizes);
  require_disjoint(pieces);
  hmi::copy_pieces(pieces);
}

// Any call may wait while another thread allocates: other Python threads should not.
template <class Getter>
py::cpp_function getter(Getter get) {
  return py::cpp_function(get, WithoutLock());
}

}  // namespace

void define_pool_types(py::module_& m) {
  if (py::detail::get_type_info(typeid(BlockPool)) != nullptr) return;
  py::register_exception_translator(&translate_pool_error);
  // To free page-locked memory can wait for the device.
  py::class_<Block>(m, "Block", py::buffer_protocol(), py::release_gil_before_calling_cpp_dtor())
      .def_buffer(&bytes_of);
  py::class_<BlockPool, std::shared_ptr<BlockPool>>(m, "BlockPool",
                                                    py::release_gil_before_calling_cpp_dtor())
      .def("allocate", &BlockPool::allocate, py::arg("bytes"), WithoutLock())
      .def("enlist", &enlist, py::arg("address"), py::arg("bytes"), py::arg("is_read_only"), WithoutLock())
      .def("close", &BlockPool::close, WithoutLock())
      .def_property_readonly("is_closed", getter(&BlockPool::is_closed))
      .def_property_readonly("is_pinned", &BlockPool::is_pinned)
      .def_property_readonly("bytes_in_use", getter(&BlockPool::bytes_in_use))
      .def_property_readonly("bytes_reserved", getter(&BlockPool::bytes_reserved))
      .def_property_readonly("budget_bytes", &BlockPool::budget_bytes);
}

void define_pool(py::module_& m) {
  define_pool_types(m);
  m.def("block_size", &block_size, py::arg("bytes"));
  m.def(
      "plain_pool", [](size_t budget_bytes) { return std::make_shared<BlockPool>(budget_bytes, plain_allocator()); },
      py::arg("budget_bytes"));
  m.def("copy_pieces", &copy_pieces, py::arg("destinations"), py::arg("sources"), py::arg("sizes"), WithoutLock());
}

}  // namespace hmi::bindings
