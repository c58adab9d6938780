#include "emulator/collectives.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <vector>

#include "emulator/machine.h"
#include "emulator/race_check.h"
#include "emulator/sites.h"

namespace emulator {
namespace {

// Threads on their way to one barrier.
struct BlockMeeting {
  int arrived = 0;
  int votes = 0;
  int result = 0;  // of the last barrier
  Place place;
};

// Lanes on their way to one collective.
struct WarpMeeting {
  unsigned mask = 0;
  unsigned arrived = 0;
  const char* what = "";
  Place place;
  void* hands[kWarpSize];
};

BlockMeeting block;
// Of warp w the lanes whose mask begins at lane l meet at 32 * w + l: masks that share no lane can meet side by side.
std::vector<WarpMeeting> warps;

bool same(const Place& a, const Place& b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

std::string hexadecimal(unsigned mask) {
  char digits[16];
  std::snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

void suspend() { Fiber::switch_between(current->fiber, machine.host); }

void release_block() {
  block.result = block.votes;
  block.arrived = block.votes = 0;
  machine.ready.draw_priorities(machine.random);
  order_block();
  for (int number = 0; number < machine.grid->num_threads(); ++number) {
    Thread& thread = *machine.threads[number];
    if (thread.state != ThreadState::kAtBarrier) continue;
    ++thread.meetings;
    make_ready(thread);
  }
}

// A last warp that the block only fills in part answers to the full mask with the lanes that it has.
unsigned lanes_of(unsigned mask) {
  const int lanes = std::min(kWarpSize, machine.grid->num_threads() - current->warp() * kWarpSize);
  return mask == kAllLanes && lanes < kWarpSize ? (1u << lanes) - 1 : mask;
}

void release_warp(WarpMeeting& meeting) {
  meeting.arrived = 0;
  const int first = current->warp() * kWarpSize;
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((meeting.mask >> lane & 1) == 0) continue;
    Thread& thread = *machine.threads[first + lane];
    ++thread.meetings;
    make_ready(thread);
  }
}

void join(WarpMeeting& meeting, unsigned mask, const char* what, const Place& place) {
  if (meeting.arrived == 0) {
    meeting.mask = mask;
    meeting.what = what;
    meeting.place = place;
    std::fill(std::begin(meeting.hands), std::end(meeting.hands), nullptr);
  } else if (meeting.mask != mask || meeting.what != what || !same(meeting.place, place)) {
    fail(std::string("lanes of a warp meet in different collectives: ") + meeting.what + " at " + text(meeting.place) +
         " with mask " + hexadecimal(meeting.mask) + ", " + what + " at " + text(place) + " with mask " +
         hexadecimal(mask));
  }
}

}  // namespace

void reset_meetings() {
  block = BlockMeeting();
  warps.resize(machine.grid->num_warps() * kWarpSize);
  for (WarpMeeting& meeting : warps) meeting.arrived = 0;
}

void leave_block() {
  if (machine.num_live > 0 && block.arrived == machine.num_live) release_block();
}

int meet_block(bool vote, Place place) {
  const Unobserved unobserved;
  if (is_dropped("barrier", place)) return vote;
  if (block.arrived == 0) {
    block.place = place;
  } else if (!same(block.place, place)) {
    fail("threads of a block meet at different barriers: " + text(block.place) + " and " + text(place));
  }
  ++block.arrived;
  block.votes += vote;
  wait_as(ThreadState::kAtBarrier, place);
  if (block.arrived == machine.num_live) release_block();
  suspend();
  return block.result;
}

void meet_warp(unsigned mask, const char* what, void* hand, Combine combine, Place place) {
  const Unobserved unobserved;
  mask = lanes_of(mask);
  const unsigned own = 1u << current->lane();
  if ((mask & own) == 0) {
    fail(std::string(what) + " at " + text(place) + ": lane " + std::to_string(current->lane()) +
         " is not in its own mask " + hexadecimal(mask));
  }
  WarpMeeting& meeting = warps[current->warp() * kWarpSize + __builtin_ctz(mask)];
  join(meeting, mask, what, place);
  meeting.arrived |= own;
  meeting.hands[current->lane()] = hand;
  wait_as(ThreadState::kAtCollective, place);
  if (meeting.arrived == mask) {
    combine(meeting.hands, mask);
    release_warp(meeting);
  }
  suspend();
}

void sync_warp(unsigned mask, Place place) {
  const Unobserved unobserved;
  if (is_dropped("warp", place)) return;
  meet_warp(
      mask, "__syncwarp", nullptr,
      [](void* const(&)[32], unsigned lanes) { order_warp(current->warp(), lanes); }, place);
}

unsigned ballot(unsigned mask, bool vote, Place place) {
  const Unobserved unobserved;
  struct Hand {
    bool vote;
    unsigned votes;
  } hand{vote, 0};
  meet_warp(
      mask, "ballot", &hand,
      [](void* const(&hands)[32], unsigned) {
        unsigned votes = 0;
        for (int lane = 0; lane < kWarpSize; ++lane) {
          if (hands[lane] != nullptr) votes |= unsigned{static_cast<Hand*>(hands[lane])->vote} << lane;
        }
        for (void* other : hands) {
          if (other != nullptr) static_cast<Hand*>(other)->votes = votes;
        }
      },
      place);
  return hand.votes;
}

uint64_t shuffle(unsigned mask, uint64_t bits, int source, Place place) {
  const Unobserved unobserved;
  const int from = source < 0 ? current->lane() : source;
  if ((lanes_of(mask) >> from & 1) == 0) {
    fail("shuffle at " + text(place) + " reads lane " + std::to_string(from) + ", which is not in the mask");
  }
  struct Hand {
    uint64_t given;
    uint64_t received;
    int from;
  } hand{bits, 0, from};
  meet_warp(
      mask, "shuffle", &hand,
      [](void* const(&hands)[32], unsigned) {
        for (void* other : hands) {
          if (other == nullptr) continue;
          Hand& receiver = *static_cast<Hand*>(other);
          receiver.received = static_cast<const Hand*>(hands[receiver.from])->given;
        }
      },
      place);
  return hand.received;
}

int lane_index() { return current->lane(); }

}  // namespace emulator
