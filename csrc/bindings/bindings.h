// The files of this folder are the only ones that know Python: addresses become pointers, every call runs without the
// interpreter's lock. hmi_kernels checks dtypes, shapes and strides before it passes an address on.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

namespace hmi::bindings {

namespace py = pybind11;

using Address = uintptr_t;
using WithoutLock = py::call_guard<py::gil_scoped_release>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void define_pool(py::module_& m);        // pool.cpp
void define_pool_types(py::module_& m);  // pool.cpp; does nothing the second time
void define_sketch(py::module_& m);      // sketch.cpp
void define_decoding(py::module_& m);    // decoding.cpp
void define_files(py::module_& m);       // files.cpp

// _C.cuda, if CUDA is compiled; the emulator of the tests makes a module of the same functions.
void define_cuda(py::module_& m);           // cuda.cpp
void define_cuda_adapters(py::module_& m);  // cuda_adapters.cpp
void define_cuda_plot(py::module_& m);      // cuda_plot.cpp
void define_cuda_products(py::module_& m);  // cuda_products.cpp
void define_cuda_copies(py::module_& m);    // cuda_copies.cpp

}  // namespace hmi::bindings
