// The module of the emulator's own tests: every kernel as a function of (output, input, parameter), with addresses.
#include "bindings/bindings.h"
#include "kernels.h"

namespace hmi::bindings {
namespace {

void define_kernels(py::module_& m, const std::vector<emulator_tests::NamedKernel>& kernels) {
  for (const auto& kernel : kernels) {
    const auto launch = kernel.launch;
    m.def(
        kernel.name,
        [launch](Address output, Address input, int parameter) {
          launch(pointer<void>(output), pointer<const void>(input), parameter);
        },
        py::arg("output"), py::arg("input"), py::arg("parameter"), WithoutLock());
  }
}

}  // namespace

void define_cuda(py::module_& m) {
  define_kernels(m, emulator_tests::async_copy_kernels());
  define_kernels(m, emulator_tests::bounds_kernels());
  define_kernels(m, emulator_tests::collective_kernels());
  define_kernels(m, emulator_tests::meeting_kernels());
  define_kernels(m, emulator_tests::race_kernels());
  define_kernels(m, emulator_tests::tensor_core_kernels());
  define_kernels(m, emulator_tests::traffic_kernels());
}

}  // namespace hmi::bindings
