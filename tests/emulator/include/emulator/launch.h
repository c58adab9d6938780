// Runs a grid: every block after another, in an order that the settings choose.
#pragma once

#include <cstddef>
#include <tuple>
#include <utility>

#include "emulator/machine.h"
#include "emulator/streams.h"

namespace emulator {

// Throws std::runtime_error if no device could run this launch.
void require_launchable(const Grid& grid, std::size_t parameter_bytes);
// Throws std::runtime_error, with the place, if the kernel does what it must not.
void run_grid(const Grid& grid);

// Copying the parameters is the launch's doing, not the kernel's: it is not observed.
template <class... Parameters, std::size_t... kIndices>
EMULATOR_UNOBSERVED void call(void (*kernel)(Parameters...), const std::tuple<Parameters...>& parameters,
                              std::index_sequence<kIndices...>) {
  observing = true;
  kernel(std::get<kIndices>(parameters)...);
}

}  // namespace emulator
