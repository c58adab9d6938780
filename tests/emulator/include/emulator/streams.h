// Streams and events of the emulated CUDA runtime: what is submitted runs at once, or as late and in as bad an order as
// CUDA allows. The functions of cuda_runtime_api.h that csrc/cuda calls are defined over this in src/runtime*.cpp.
#pragma once

#include <driver_types.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

// When submitted work runs.
enum class StreamOrder {
  kImmediate,  // at submission
  kRandom,     // whenever somebody waits, and now and then before: any stream whose next work may run, by the seed
  kLatest,     // only what somebody waits for, and only when he does
};

// Adds work to a stream. It runs on whichever host thread makes it run; what it throws comes out of the call that made
// it run. Throws std::runtime_error if the stream was destroyed.
void submit(cudaStream_t stream, std::function<void()> work);

// The error that fail_next() ordered for this call of the function, or cudaSuccess.
cudaError_t injected_error(const std::string& function);

// Settings, all for the whole process. Changing the order runs everything that is still queued.
void set_stream_order(StreamOrder order, uint64_t seed);
void fail_next(const std::string& function, int count, cudaError_t error);
void clear_injected_errors();

// Runs whatever is queued on any stream of any device.
void run_everything();

// Things that a correct program never does and that CUDA does not always refuse, such as freeing memory that a copy
// still reads. Taking them empties the list.
void report_problem(const std::string& what);
std::vector<std::string> take_problems();

// How often a stream was made to wait for an event that nobody had recorded: legal, without effect, and suspicious.
int64_t num_waits_for_unrecorded_events();

}  // namespace emulator
