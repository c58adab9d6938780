#pragma once

#include <pybind11/pybind11.h>

namespace emulator {

// Streams, device memory, failures and orders for tests: see tests/emulator/streams.py.
void define_runtime(pybind11::module_& m);

}  // namespace emulator
