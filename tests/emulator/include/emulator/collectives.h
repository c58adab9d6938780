// Where threads of a block meet: barriers, and what the lanes of a warp do together.
#pragma once

#include <cstdint>

#include "emulator/place.h"

namespace emulator {

constexpr unsigned kAllLanes = 0xffffffffu;

// All threads that have not exited meet at one __syncthreads; the result is how many came with vote.
int meet_block(bool vote, Place place);
// Nobody comes to meet_block or meet_warp of this launch any more.
void reset_meetings();
// The running thread has exited: a barrier may now be complete.
void leave_block();

// Gets what every lane of the mask has handed in, when all have come: null where a lane is not in the mask.
using Combine = void (*)(void* const (&hands)[32], unsigned mask);
// The lanes of the mask meet; the last to come runs combine. All must come to the same place with the same mask.
void meet_warp(unsigned mask, const char* what, void* hand, Combine combine, Place place);

void sync_warp(unsigned mask, Place place);
unsigned ballot(unsigned mask, bool vote, Place place);
// The bits of lane source; -1: one's own.
uint64_t shuffle(unsigned mask, uint64_t bits, int source, Place place);
int lane_index();

}  // namespace emulator
