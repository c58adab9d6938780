// What a launch moves. The lanes of a warp that execute one instruction together make one request: its 32-byte sectors
// of global memory, its bank conflicts in shared memory.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "emulator/memory_access.h"

namespace emulator {

// Requests of one instruction to shared memory. A wavefront serves every bank once; fewest is what the same lanes and
// widths would need without conflicts.
struct SharedTraffic {
  uint64_t requests = 0;
  uint64_t wavefronts = 0;
  uint64_t fewest = 0;
  uint32_t worst_degree = 0;  // most wavefronts that one phase of a request took
};

struct GlobalTraffic {
  uint64_t sector_bytes = 0;    // 32 for every sector of every request: what the first-level caches are asked for
  uint64_t block_bytes = 0;     // the same without sectors that the block has already asked for: a perfect first level
  uint64_t distinct_bytes = 0;  // bytes touched in the launch at least once: the least that any kernel must move
};

struct LaunchCounters {
  uint32_t kernel = 0;  // offset of its code in this module
  uint64_t blocks = 0;
  GlobalTraffic reads;
  GlobalTraffic writes;
  std::map<uint32_t, SharedTraffic> shared;           // by the code offset of the instruction
  std::map<uint32_t, uint64_t> global_sector_bytes;   // likewise
};

void begin_launch_counters();
void end_block_counters();
void end_launch_counters();
void count_access(const Access& access);

// Of the launches since the last call of forget_counters.
const std::vector<LaunchCounters>& launch_counters();
void forget_counters();

}  // namespace emulator
