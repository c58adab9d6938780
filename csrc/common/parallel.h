// Parallel loops for the CPU kernels, on one team of threads per process that never fights torch's.
#pragma once

#include <cstdint>
#include <type_traits>

namespace hmi {

// kAuto takes the OpenMP team that torch already runs, if there is one in the process: its workers spin for a while
// after each region, and a second set of threads would have to wait for their cores. Without one, kPool: our own.
enum class ThreadsMode { kAuto, kPool, kOpenMp };

// Throws std::invalid_argument if kOpenMp is asked for and the process has no OpenMP runtime.
void set_threads_mode(ThreadsMode mode);
// What parallel_for uses now: kPool or kOpenMp, never kAuto.
ThreadsMode active_threads_mode();
// Ends the OpenMP threads that wait for the calling thread's next parallel region, which starts new ones. Does nothing
// where there are none, in a region, and where the runtime is older than OpenMP 5.0.
void release_team() noexcept;

namespace detail {
using TaskFunction = void (*)(const void* body, int64_t task, int worker);
void run_tasks(int num_threads, int64_t num_tasks, TaskFunction function, const void* body);
}  // namespace detail

// Calls body(task, worker) once for every task in [0, num_tasks), worker in [0, num_threads); returns when all are
// done. A worker runs one task at a time. With one thread or one task nobody is woken. Bodies must be noexcept:
// report errors through FirstError and throw after the loop.
template <class Body>
void parallel_for(int num_threads, int64_t num_tasks, const Body& body) {
  static_assert(std::is_nothrow_invocable_v<const Body&, int64_t, int>, "exceptions must not cross threads");
  detail::run_tasks(
      num_threads, num_tasks,
      [](const void* erased, int64_t task, int worker) { (*static_cast<const Body*>(erased))(task, worker); }, &body);
}

// All the threads or none: an OpenMP team keeps its threads only while its size stays the same.
inline int threads_for(int num_threads, int64_t work, int64_t work_worth_a_thread) {
  return work >= 2 * work_worth_a_thread ? num_threads : 1;
}

}  // namespace hmi
