// Runs the fibers of a block until all have exited.
#include <algorithm>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "emulator/async_copy.h"
#include "emulator/collectives.h"
#include "emulator/counters.h"
#include "emulator/launch.h"
#include "emulator/race_check.h"
#include "emulator/shared_memory.h"

namespace emulator {

Machine machine;
Thread* current = nullptr;
bool observing = false;

namespace {

std::mutex one_launch;

std::string coordinates(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

// A linear number as an index in an extent, x fastest.
uint3 index_in(const dim3& extent, uint32_t number) {
  return {number % extent.x, number / extent.x % extent.y, number / (extent.x * extent.y)};
}

[[noreturn]] void leave_for_good() {
  Fiber::switch_between(current->fiber, machine.host, true);
  __builtin_unreachable();
}

void run_thread() {
  machine.grid->body();
  observing = false;
  require_no_copies();
  current->state = ThreadState::kExited;
  --machine.num_live;
  leave_block();
  leave_for_good();
}

void begin_thread(Thread& thread, int number) {
  thread.number = number;
  thread.index = index_in(machine.grid->threads, number);
  thread.meetings = 0;
  thread.open_copies.clear();
  thread.copy_groups.clear();
  thread.fiber.prepare(&run_thread);
  make_ready(thread);
}

const char* what_it_does(ThreadState state) {
  switch (state) {
    case ThreadState::kAtBarrier:
      return " waits at the barrier ";
    case ThreadState::kAtCollective:
      return " waits in the warp's collective ";
    default:
      return " could go on at ";
  }
}

// Who waits where; of neighbours that wait at the same place the first is told.
std::string deadlock() {
  std::string message = "deadlock:";
  const Thread* told = nullptr;
  for (int number = 0; number < machine.grid->num_threads(); ++number) {
    const Thread& thread = *machine.threads[number];
    if (thread.state == ThreadState::kExited) continue;
    if (told != nullptr && told->state == thread.state && told->waits_at.line == thread.waits_at.line) continue;
    told = &thread;
    message += " from thread " + std::to_string(number) + " on" + what_it_does(thread.state) +
               text(thread.waits_at) + ";";
  }
  return message + " " + std::to_string(machine.grid->num_threads() - machine.num_live) + " have exited" +
         " [block " + coordinates(machine.block_index) + "]";
}

void run_threads() {
  while (machine.error.empty()) {
    const int number = machine.ready.take(machine.random);
    if (number < 0) {
      if (machine.num_live > 0) machine.error = deadlock();
      return;
    }
    current = machine.threads[number].get();
    ++machine.switches;
    Fiber::switch_between(machine.host, current->fiber);
    current = nullptr;
  }
}

void run_block(uint32_t number) {
  const Grid& grid = *machine.grid;
  machine.block_number = number;
  machine.block_index = index_in(grid.blocks, number);
  ++machine.blocks_begun;
  machine.num_live = grid.num_threads();
  reset_meetings();
  begin_block_shared();
  begin_block_races(grid.num_warps());
  machine.ready.reset(machine.settings.order, grid.num_warps());
  machine.ready.draw_priorities(machine.random);
  for (int thread = 0; thread < grid.num_threads(); ++thread) begin_thread(*machine.threads[thread], thread);
  run_threads();
  end_block_shared();
  end_block_counters();
}

std::vector<uint32_t> block_order(std::size_t num_blocks) {
  std::vector<uint32_t> order(num_blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.settings.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (machine.settings.order == Order::kRandom) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

}  // namespace

void fail(const std::string& what) {
  observing = false;
  if (machine.error.empty()) {
    machine.error = what + " [block " + coordinates(machine.block_index) + ", thread " +
                    coordinates(current->index) + "]";
  }
  leave_for_good();
}

void wait_as(ThreadState state, const Place& place) {
  current->state = state;
  current->waits_at = place;
}

void make_ready(Thread& thread) {
  thread.state = ThreadState::kReady;
  machine.ready.add(thread.number);
}

void run_grid(const Grid& grid) {
  const std::lock_guard<std::mutex> lock(one_launch);
  machine.grid = &grid;
  machine.error.clear();
  machine.random.seed(machine.settings.seed);
  ++machine.launches;
  while (static_cast<int>(machine.threads.size()) < grid.num_threads()) {
    machine.threads.push_back(std::make_unique<Thread>());
  }
  begin_launch_shared(grid.shared_bytes);
  begin_launch_races();
  begin_launch_counters();
  for (const uint32_t block : block_order(grid.num_blocks())) {
    run_block(block);
    if (!machine.error.empty()) break;
  }
  end_launch_counters();
  end_launch_shared();
  machine.grid = nullptr;
  if (!machine.error.empty()) throw std::runtime_error(machine.error);
}

}  // namespace emulator
