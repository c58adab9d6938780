// The threads of a block that could go on, and which of them does.
#pragma once

#include <cstddef>
#include <random>
#include <vector>

#include "emulator/settings.h"

namespace emulator {

class ReadyQueue {
 public:
  void reset(Order order, int num_warps);
  void add(int thread);
  // Takes a thread out; -1 if there is none.
  int take(std::mt19937_64& random);
  // Draws which warps are fast from now on (kRandom only).
  void draw_priorities(std::mt19937_64& random);

 private:
  int take_random(std::mt19937_64& random);

  Order order_ = Order::kInOrder;
  std::vector<int> line_;                    // kInOrder, kReverse
  std::size_t head_ = 0;
  std::vector<std::vector<int>> of_warp_;    // kRandom
  std::vector<int> priorities_;              // warps, fastest first
};

}  // namespace emulator
