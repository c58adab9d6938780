// What a test chooses; constant during a launch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace emulator {

// In which order the threads that could go on do. kRandom also draws, anew after every barrier, which warps are fast:
// choosing uniformly among threads keeps all warps close together, and hides races that hardware would show.
enum class Order { kInOrder, kReverse, kRandom };

// When a cp.async takes place between its start and the wait for it. kLate finds waits that wait for too little.
enum class CopyTime { kLate, kEarly, kRandom };

// A synchronization that is skipped, to see whether a test notices: kind as in Site::kind.
struct SiteName {
  std::string kind;
  std::string file;  // the end of the path
  int line = 0;
};

struct Settings {
  Order order = Order::kRandom;
  uint64_t seed = 0;
  CopyTime copy_time = CopyTime::kLate;
  bool check_races = false;         // only in builds whose kernels are instrumented
  bool count_accesses = false;      // likewise
  bool allow_sm90_shared = false;   // 227 KiB of shared memory instead of the 163 KiB that sm_80 has as well
  std::vector<SiteName> dropped;
};

}  // namespace emulator
