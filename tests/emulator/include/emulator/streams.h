// Where launches go.
#pragma once

#include <driver_types.h>

#include <functional>

namespace emulator {

// Runs the work in the order of the stream: at once.
void submit(cudaStream_t stream, std::function<void()> work);

}  // namespace emulator
