// Hammers what several threads of HMI share, for ThreadSanitizer to watch. Fails on a wrong result too.
//
// stress_threads FOLDER [SECTION...]: files are made in the folder; without sections all of them run.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/block_pool.h"
#include "common/file_reads.h"
#include "common/parallel.h"
#include "common/read_files.h"
#include "common/read_latency.h"
#include "common/reader_pool.h"
#include "common/thread_pool.h"
#include "cpu/frequency_sketch.h"
#include "cpu/ngram_counter.h"

namespace {

constexpr double kForever = std::numeric_limits<double>::infinity();
constexpr int kNumThreads = 6;
constexpr int kNumFiles = 12;
constexpr int kFileBytes = 20000;

std::string folder;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::_Exit(2);
}

void in_threads(int num_threads, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

// ---- files ----

std::string path_of(int number) { return folder + "/" + std::to_string(number); }

void write_files() {
  for (int i = 0; i < kNumFiles; ++i) {
    std::ofstream(path_of(i)) << std::string(kFileBytes, static_cast<char>('a' + i));
  }
}

// Destinations, and the reads of all files into them; the last file is missing.
struct Wanted {
  std::vector<std::string> bytes = std::vector<std::string>(kNumFiles + 1, std::string(kFileBytes, '\0'));

  std::vector<hmi::FileRead> reads() {
    std::vector<hmi::FileRead> all;
    for (int i = 0; i <= kNumFiles; ++i) all.push_back({path_of(i), 0, kFileBytes, bytes[i].data()});
    return all;
  }

  // Whoever learns that a read has ended may look at its bytes, while others go on.
  void check(int number, const hmi::FileReadOutcome& outcome) const {
    if (outcome.error == ECANCELED) return;
    if (number == kNumFiles) return require(outcome.error == ENOENT, "a missing file");
    require(outcome.error == 0 && outcome.bytes_read == kFileBytes, "an outcome");
    require(bytes[number] == std::string(kFileBytes, static_cast<char>('a' + number)), "bytes of a file");
  }

  void check_ended(const hmi::FileReads& reads) const {
    const std::vector<hmi::ReadProgress> progress = reads.progress();
    for (int i = 0; i <= kNumFiles; ++i) {
      if (progress[i].stage == hmi::ReadStage::kEnded) check(i, progress[i].outcome);
    }
  }
};

std::shared_ptr<hmi::FileReads> submit(std::vector<hmi::FileRead> reads, int num_threads) {
  const auto all = std::make_shared<hmi::FileReads>(std::move(reads), false, num_threads);
  require(hmi::reader_pool().submit(all), "a thread to read");
  return all;
}

void read_and_wait(int seed) {
  std::mt19937 random(seed);
  for (int round = 0; round < 25; ++round) {
    Wanted wanted;
    const auto reads = submit(wanted.reads(), 1 + static_cast<int>(random() % 8));
    if (random() % 4 == 0) reads->cancel();
    while (!reads->wait(1e-4)) wanted.check_ended(*reads);
    wanted.check_ended(*reads);
    require(reads->is_done() && reads->seconds() >= 0, "the end");
  }
}

// Nobody waits: memory is freed as soon as is_done() allows it.
void read_and_drop(int seed) {
  for (int round = 0; round < 25; ++round) {
    auto wanted = std::make_unique<Wanted>();
    auto reads = submit(wanted->reads(), 1 + seed % 3);
    if (round % 2 == 0) reads->cancel();
    while (!reads->is_done()) std::this_thread::yield();
    reads.reset();
    wanted.reset();
  }
}

void read_at_once(int) {
  for (int round = 0; round < 25; ++round) {
    Wanted wanted;
    const std::vector<hmi::FileReadOutcome> outcomes = hmi::read_files(wanted.reads(), false, 4);
    for (int i = 0; i <= kNumFiles; ++i) wanted.check(i, outcomes[i]);
  }
}

// Others wait for one call's reads while it is canceled.
void wait_together(int) {
  for (int round = 0; round < 10; ++round) {
    Wanted wanted;
    const auto reads = submit(wanted.reads(), 2);
    in_threads(3, [&](int i) {
      if (i == 0) reads->cancel();
      require(reads->wait(kForever), "waiting");
      wanted.check_ended(*reads);
    });
  }
}

void change_latency(int) {
  for (int round = 0; round < 50; ++round) {
    hmi::set_read_latency(round % 2 * 1e-5, round % 3 == 0 ? kForever : 1e9);
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  hmi::set_read_latency(0, kForever);
}

void hammer_readers() {
  write_files();
  const std::string stuck = folder + "/stuck";
  require(mkfifo(stuck.c_str(), 0600) == 0, "a named pipe");
  std::vector<char> byte(3);
  std::vector<hmi::FileRead> held_up;
  for (int i = 0; i < 3; ++i) held_up.push_back({stuck, 0, 1, &byte[i]});
  held_up.push_back({path_of(0), 0, 0, nullptr});
  const auto reads = submit(held_up, 2);
  const std::vector<std::function<void(int)>> bodies{read_and_wait, read_and_drop, read_at_once, wait_together,
                                                     change_latency, read_and_wait};
  in_threads(static_cast<int>(bodies.size()), [&](int i) { bodies[i](i); });
  while (reads->progress()[3].stage != hmi::ReadStage::kEnded) require(!reads->wait(0.01), "a stuck read");
  while (!reads->wait(0.001)) close(open(stuck.c_str(), O_WRONLY | O_NONBLOCK));
  require(reads->progress()[0].outcome.error == ESPIPE, "the outcome of a pipe");
}

// ---- threads that share a loop ----

void hammer_thread_pool() {
  hmi::ThreadPool& pool = *new hmi::ThreadPool;  // its threads never end
  in_threads(3, [&](int) {
    for (int round = 0; round < 300; ++round) {
      std::vector<int64_t> slots(64);
      std::atomic<size_t> next{0};
      pool.run(3, [&] {
        for (size_t i = next.fetch_add(1, std::memory_order_relaxed); i < slots.size();
             i = next.fetch_add(1, std::memory_order_relaxed)) {
          slots[i] = static_cast<int64_t>(i);
        }
      });
      require(std::accumulate(slots.begin(), slots.end(), int64_t{0}) == 63 * 32, "a region of the pool");
    }
  });
}

void hammer_parallel_for() {
  hmi::set_threads_mode(hmi::ThreadsMode::kPool);
  in_threads(3, [&](int) {
    for (int round = 0; round < 300; ++round) {
      std::vector<int64_t> slots(50);
      std::vector<int64_t> by_worker(4);
      hmi::parallel_for(4, 50, [&](int64_t task, int worker) noexcept {
        slots[task] = task;
        by_worker[worker] += 1;  // a worker runs one task at a time
      });
      require(std::accumulate(slots.begin(), slots.end(), int64_t{0}) == 49 * 25, "a parallel loop");
      require(std::accumulate(by_worker.begin(), by_worker.end(), int64_t{0}) == 50, "the workers' tasks");
    }
  });
}

void hammer_counter() {
  hmi::set_threads_mode(hmi::ThreadsMode::kPool);
  std::vector<int32_t> ids(100000);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i % 1000);
  const int64_t offsets[] = {0, static_cast<int64_t>(ids.size())};
  in_threads(2, [&](int) {
    hmi::NgramCounter counter(1);
    for (int round = 0; round < 3; ++round) counter.add({ids.data(), offsets, 1, offsets[1]}, 4);
    require(counter.size() == 1000 && counter.total() == 300000, "counts");
    for (const hmi::KeyCount& item : counter.items(1, 4)) require(item.count == 300, "a count");
  });
}

// ---- what threads share under locks ----

void use_blocks(hmi::BlockPool& pool, int seed) {
  std::mt19937 random(seed);
  std::vector<std::unique_ptr<hmi::Block>> blocks;
  for (int round = 0; round < 2000; ++round) {
    try {
      blocks.push_back(pool.allocate(1 + random() % 20000));
      std::memset(blocks.back()->address(), seed, blocks.back()->bytes());
    } catch (const hmi::PoolExhausted&) {
      blocks.clear();
    }
    if (random() % 3 == 0) blocks.clear();
    require(pool.bytes_in_use() <= pool.budget_bytes() && pool.bytes_reserved() <= pool.budget_bytes(), "the budget");
  }
}

void hammer_block_pool() {
  const auto pool = std::make_shared<hmi::BlockPool>(64 * 4096, hmi::plain_allocator());
  std::vector<char> enlisted(kNumThreads * 4096);
  in_threads(kNumThreads, [&](int i) {
    try {
      pool->enlist(enlisted.data() + i * 4096, 4096, false);
      use_blocks(*pool, i);
    } catch (const hmi::PoolClosed&) {  // by a faster thread
    } catch (const hmi::PoolExhausted&) {
    }
    pool->close();
  });
  require(pool->bytes_in_use() == 0 && pool->bytes_reserved() == 0, "all is given back");
}

void hammer_sketch() {
  hmi::FrequencySketch sketch(1 << 12);
  hmi::FrequencySketch other(1 << 10);
  in_threads(kNumThreads, [&](int i) {
    std::mt19937 random(i);
    std::vector<int64_t> keys(4000);
    for (int round = 0; round < 6; ++round) {
      for (int64_t& key : keys) key = 1 + static_cast<int64_t>(random() % (1 << 14));
      (i % 2 == 0 ? sketch : other).add(keys.data(), static_cast<int64_t>(keys.size()), 1);
      if (i == 0) sketch.merge(other);
      if (i == 1) other.merge(sketch);
      if (i == 2) require(!sketch.items(0).empty(), "items");
      if (i == 3) sketch.scale(0.5);
      if (i == 4) require(sketch.total() > 0 && sketch.max_error() >= 0 && sketch.size() > 0, "totals");
      if (i == 5) require(other.memory_bytes() <= hmi::FrequencySketch::max_memory_bytes(1 << 10), "memory");
    }
    if (i == 5) other.clear();
  });
}

struct Section {
  const char* name;
  void (*run)();
};

constexpr Section kSections[] = {
    {"readers", hammer_readers}, {"thread_pool", hammer_thread_pool}, {"parallel_for", hammer_parallel_for},
    {"counter", hammer_counter}, {"block_pool", hammer_block_pool},   {"sketch", hammer_sketch},
};

}  // namespace

int main(int argc, char** argv) {
  require(argc >= 2, "usage: stress_threads FOLDER [SECTION...]");
  folder = argv[1];
  for (const Section& section : kSections) {
    bool is_wanted = argc == 2;
    for (int i = 2; i < argc; ++i) is_wanted |= std::strcmp(argv[i], section.name) == 0;
    if (!is_wanted) continue;
    section.run();
    std::printf("%s\n", section.name);
  }
  return 0;
}
