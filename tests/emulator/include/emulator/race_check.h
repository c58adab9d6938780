// Two accesses of one byte, at least one a write, by two threads that nothing puts in order, are a race. Order is made
// by __syncthreads within a block and __syncwarp within the lanes of its mask; shuffles and ballots make none (CUDA:
// "these intrinsics do not imply a memory barrier"), nor does anything between two blocks of a launch.
#pragma once

#include "emulator/memory_access.h"

namespace emulator {

void begin_launch_races();
void begin_block_races(int num_warps);
void order_block();
void order_warp(int warp, unsigned mask);
// Ends the launch with an error if the access races with an earlier one.
void check_race(const Access& access);

}  // namespace emulator
