#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <functional>
#include <stdexcept>

#include "common/thread_pool.h"

namespace hmi {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned num_threads, unsigned flags);

// The entry point that GCC emits for `#pragma omp parallel`; libgomp, libomp and libiomp5 all export it.
GompParallel find_openmp() { return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }

// What omp_pause_soft is in <omp.h>: threads may go, and nothing that was set is forgotten.
constexpr int kPauseSoft = 1;
using PauseResources = int (*)(int kind);

std::atomic<ThreadsMode> requested_mode{ThreadsMode::kAuto};
// fork() copies the caller's thread only. What waits for the others would wait for ever, so that the child gets a new
// pool, and no OpenMP: libgomp cannot be used in a child whose parent has used it.
std::atomic<bool> is_forked_child{false};
std::atomic<ThreadPool*> pool{nullptr};

void after_fork_in_child() {
  is_forked_child.store(true);
  pool.store(new ThreadPool);  // the old one is abandoned with its lost threads and locks
}

// Never destroyed, so that no thread outlives it while the process ends.
ThreadPool& shared_pool() {
  static const bool created = [] {
    pool.store(new ThreadPool);
    pthread_atfork(nullptr, nullptr, after_fork_in_child);
    return true;
  }();
  (void)created;
  return *pool.load();
}

struct Region {
  int64_t num_tasks;
  detail::TaskFunction function;
  const void* body;
  std::atomic<int64_t> next_task{0};
  std::atomic<int> next_worker{0};

  // Tasks are taken one by one, so that a thread that was held up takes fewer.
  void work() noexcept {
    const int worker = next_worker.fetch_add(1, std::memory_order_relaxed);
    for (;;) {
      const int64_t task = next_task.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) return;
      function(body, task, worker);
    }
  }
};

}  // namespace

void set_threads_mode(ThreadsMode mode) {
  if (mode == ThreadsMode::kOpenMp && find_openmp() == nullptr) {
    throw std::invalid_argument("threads mode openmp: this process has loaded no OpenMP runtime; use auto or pool");
  }
  requested_mode.store(mode);
}

ThreadsMode active_threads_mode() {
  if (requested_mode.load() == ThreadsMode::kPool || is_forked_child.load()) return ThreadsMode::kPool;
  return find_openmp() != nullptr ? ThreadsMode::kOpenMp : ThreadsMode::kPool;
}

void release_team() noexcept {
  if (is_forked_child.load()) return;
  static const auto pause = reinterpret_cast<PauseResources>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  if (pause != nullptr) pause(kPauseSoft);
}

namespace detail {

void run_tasks(int num_threads, int64_t num_tasks, TaskFunction function, const void* body) {
  if (num_threads <= 1 || num_tasks <= 1) {
    for (int64_t task = 0; task < num_tasks; ++task) function(body, task, 0);
    return;
  }
  Region region{num_tasks, function, body};
  ThreadPool& own = shared_pool();  // also installs the fork handler that both modes need
  if (active_threads_mode() == ThreadsMode::kOpenMp) {
    static const GompParallel openmp_parallel = find_openmp();
    openmp_parallel([](void* erased) { static_cast<Region*>(erased)->work(); }, &region,
                    static_cast<unsigned>(num_threads), 0);
  } else {
    own.run(num_threads - 1, [&region] { region.work(); });
  }
}

}  // namespace detail
}  // namespace hmi
