// The state of the launch that runs: one block at a time, all its threads as fibers of one thread of the host.
#pragma once

#include <vector_types.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/place.h"
#include "emulator/ready_queue.h"
#include "emulator/settings.h"

namespace emulator {

constexpr int kWarpSize = 32;
constexpr int kMaxThreads = 1024;

// One 16-byte cp.async: zeros if not valid.
struct AsyncCopy {
  void* destination;
  const void* source;
  bool valid;
  bool done;
  const void* program_counter;
};

enum class ThreadState { kReady, kAtBarrier, kAtCollective, kExited };

struct Thread {
  Fiber fiber;
  int number = 0;  // in the block
  uint3 index{};
  ThreadState state = ThreadState::kExited;
  Place waits_at;
  // How often this thread has met others; accesses of a warp's lanes belong together only between two meetings.
  uint32_t meetings = 0;
  std::vector<AsyncCopy> open_copies;                  // not committed yet
  std::vector<std::vector<AsyncCopy>> copy_groups;     // committed, oldest first

  int warp() const { return number / kWarpSize; }
  int lane() const { return number % kWarpSize; }
};

struct Grid {
  dim3 blocks;
  dim3 threads;
  std::size_t shared_bytes = 0;
  const void* kernel = nullptr;    // its address, to name it
  std::function<void()> body;      // calls the kernel

  int num_threads() const { return static_cast<int>(threads.x * threads.y * threads.z); }
  int num_warps() const { return (num_threads() + kWarpSize - 1) / kWarpSize; }
  std::size_t num_blocks() const { return std::size_t(blocks.x) * blocks.y * blocks.z; }
};

struct Machine {
  Settings settings;
  const Grid* grid = nullptr;
  uint3 block_index{};
  uint32_t block_number = 0;
  uint64_t launches = 0;      // so far
  uint64_t blocks_begun = 0;  // so far, over all launches
  uint64_t switches = 0;      // of fibers, so far
  Fiber host;
  std::vector<std::unique_ptr<Thread>> threads;
  int num_live = 0;
  ReadyQueue ready;
  std::mt19937_64 random;
  std::string error;  // the first of this launch; empty: none
};

extern Machine machine;
// The thread that runs; null while the host does.
extern Thread* current;
// Whether memory accesses are the kernel's: false in the host's code and in the emulator's own.
extern bool observing;

// Within its scope, accesses are not the kernel's.
class Unobserved {
 public:
  EMULATOR_UNOBSERVED Unobserved() : before_(observing) { observing = false; }
  EMULATOR_UNOBSERVED ~Unobserved() { observing = before_; }
  Unobserved(const Unobserved&) = delete;
  Unobserved& operator=(const Unobserved&) = delete;

 private:
  bool before_;
};

// Ends the launch with an error that names the running thread.
[[noreturn]] void fail(const std::string& what);

// The running thread waits until make_ready is called for it.
void wait_as(ThreadState state, const Place& place);
void make_ready(Thread& thread);

}  // namespace emulator
