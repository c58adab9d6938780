// The synchronizations of the kernels: each place where one is written down is a site. Tests skip them one at a time;
// a kernel that is right without one has a synchronization too many or a test too few.
#pragma once

#include <cstdint>
#include <vector>

#include "emulator/place.h"

namespace emulator {

struct Site {
  const char* kind;  // "barrier", "warp", "copy wait"
  Place place;
  uint64_t count;  // how often a thread came here
  bool dropped;
};

// Counts a use of the site; whether it is to be skipped.
bool is_dropped(const char* kind, const Place& place);
// Forgets all counts and applies settings.dropped.
void reset_sites();
std::vector<Site> used_sites();

}  // namespace emulator
