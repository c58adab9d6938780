#include "emulator/ready_queue.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace emulator {

void ReadyQueue::reset(Order order, int num_warps) {
  order_ = order;
  line_.clear();
  head_ = 0;
  of_warp_.resize(num_warps);
  for (auto& threads : of_warp_) threads.clear();
  priorities_.resize(num_warps);
  std::iota(priorities_.begin(), priorities_.end(), 0);
}

void ReadyQueue::add(int thread) { (order_ == Order::kRandom ? of_warp_[thread / 32] : line_).push_back(thread); }

int ReadyQueue::take(std::mt19937_64& random) {
  if (order_ == Order::kRandom) return take_random(random);
  if (head_ == line_.size()) return -1;
  int thread = line_.back();
  if (order_ == Order::kReverse) {
    line_.pop_back();
  } else {
    thread = line_[head_++];
  }
  if (head_ == line_.size()) {
    line_.clear();
    head_ = 0;
  }
  return thread;
}

int ReadyQueue::take_random(std::mt19937_64& random) {
  for (const int warp : priorities_) {
    auto& threads = of_warp_[warp];
    if (threads.empty()) continue;
    std::swap(threads.back(), threads[random() % threads.size()]);
    const int thread = threads.back();
    threads.pop_back();
    return thread;
  }
  return -1;
}

void ReadyQueue::draw_priorities(std::mt19937_64& random) {
  if (order_ == Order::kRandom) std::shuffle(priorities_.begin(), priorities_.end(), random);
}

}  // namespace emulator
