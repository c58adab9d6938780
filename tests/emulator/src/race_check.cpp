// Happens-before by the byte. Time within a warp is the number of its __syncwarps so far; what happens between two
// barriers of a block is an interval. Intervals are numbered through all blocks and launches, so that a number says at
// once whether an access was in this interval, in this block, or in this launch.
#include "emulator/race_check.h"

#include <algorithm>
#include <array>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/machine.h"
#include "emulator/symbols.h"

namespace emulator {
namespace {

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kMaxKeptPages = 1024;  // 200 MiB
constexpr uint16_t kNobody = 0xffff;

// What is remembered of one byte.
struct Shadow {
  uint32_t write_interval = 0;
  uint32_t write_time = 0;
  uint32_t write_code = 0;
  uint32_t read_interval = 0;
  uint32_t read_time = 0;  // the first of reader_lanes
  uint32_t read_code = 0;
  uint32_t earlier_block_interval = 0;  // the last read by another block than reader's
  uint32_t constant_interval = 0;       // the last read that trusts nobody to write in this launch
  uint32_t reader_lanes = 0;            // of the warp of reader, those that read and are not ordered among each other
  uint16_t writer = kNobody;            // threads
  uint16_t reader = kNobody;
  uint16_t reader_elsewhere = kNobody;  // a reader of another warp in the same interval
};
using Page = std::vector<Shadow>;

// What lanes know of each other: known[a][b] is the time up to which what b did comes before what a does.
struct WarpClock {
  uint32_t time = 1;
  uint32_t all_known = 0;  // the time of the last __syncwarp of all lanes
  std::array<std::array<uint32_t, kWarpSize>, kWarpSize> known{};

  bool knows(int lane, int other, uint32_t time_of_other) const {
    return std::max(all_known, known[lane][other]) >= time_of_other;
  }
};

std::unordered_map<uintptr_t, Page> pages;
uintptr_t last_page = 0;
Page* last_shadows = nullptr;

uint32_t interval = 0;
uint32_t first_of_launch = 0;
uint32_t first_of_block = 0;
std::vector<WarpClock> clocks;

Shadow& shadow_of(uintptr_t address) {
  if (last_shadows == nullptr || address / kPageBytes != last_page) {
    last_page = address / kPageBytes;
    last_shadows = &pages[last_page];
    if (last_shadows->empty()) last_shadows->resize(kPageBytes);
  }
  return (*last_shadows)[address % kPageBytes];
}

// Whether the running thread comes after what the other thread did.
bool comes_after(int other, uint32_t other_interval, uint32_t other_time, bool shared) {
  if (other_interval < first_of_launch) return true;
  if (other_interval < first_of_block) return shared;  // another block's shared memory is another memory
  if (other == current->number || other_interval < interval) return true;
  if (other / kWarpSize != current->warp()) return false;
  return clocks[current->warp()].knows(current->lane(), other % kWarpSize, other_time);
}

bool comes_after_write(const Shadow& shadow, bool shared) {
  return shadow.writer == kNobody || comes_after(shadow.writer, shadow.write_interval, shadow.write_time, shared);
}

// The reader that the running thread does not come after; kNobody if there is none.
uint16_t unordered_reader(const Shadow& shadow, bool shared) {
  const auto is_unordered = [&](int thread) {
    return !comes_after(thread, shadow.read_interval, shadow.read_time, shared);
  };
  if (shadow.reader == kNobody) return kNobody;
  if (shadow.reader_elsewhere != kNobody && is_unordered(shadow.reader_elsewhere)) return shadow.reader_elsewhere;
  const int first = shadow.reader / kWarpSize * kWarpSize;
  for (uint32_t lanes = shadow.reader_lanes; lanes != 0; lanes &= lanes - 1) {
    const int thread = first + __builtin_ctz(lanes);
    if (is_unordered(thread)) return static_cast<uint16_t>(thread);
  }
  return kNobody;
}

void remember_write(Shadow& shadow, uint32_t code) {
  shadow.writer = static_cast<uint16_t>(current->number);
  shadow.write_interval = interval;
  shadow.write_time = clocks[current->warp()].time;
  shadow.write_code = code;
}

void remember_read(Shadow& shadow, uint32_t code) {
  const WarpClock& clock = clocks[current->warp()];
  const uint32_t own = 1u << current->lane();
  if (shadow.reader != kNobody && shadow.read_interval == interval) {
    if (shadow.reader / kWarpSize != current->warp()) {
      shadow.reader_elsewhere = static_cast<uint16_t>(current->number);
      return;
    }
    if (shadow.read_time == clock.time) {
      shadow.reader_lanes |= own;
      return;
    }
    // Whoever comes after this read also comes after the reads that this one comes after.
    uint32_t lanes = own;
    for (int lane = 0; lane < kWarpSize; ++lane) {
      const bool is_reader = shadow.reader_lanes >> lane & 1;
      if (is_reader && !clock.knows(current->lane(), lane, shadow.read_time)) lanes |= 1u << lane;
    }
    shadow.reader_lanes = lanes;
    if (lanes != own) return;
  } else {
    if (shadow.read_interval < first_of_block) shadow.earlier_block_interval = shadow.read_interval;
    shadow.reader_elsewhere = kNobody;
    shadow.reader_lanes = own;
  }
  shadow.reader = static_cast<uint16_t>(current->number);
  shadow.read_interval = interval;
  shadow.read_time = clock.time;
  shadow.read_code = code;
}

[[noreturn]] void report(const char* what, const Access& access, int other, uint32_t other_interval,
                         uint32_t other_code) {
  const std::vector<std::string> places = places_of({other_code, access.code});
  fail(std::string("race: ") + what + " in " + (access.shared ? "shared" : "global") + " memory: thread " +
       std::to_string(other) + (other_interval < first_of_block ? " of another block" : "") + " at " + places[0] +
       ", then thread " + std::to_string(current->number) + " at " + places[1]);
}

void check_constant_read(Shadow& shadow, const Access& access) {
  if (shadow.writer != kNobody && shadow.write_interval >= first_of_launch) {
    report("constant load of what the launch writes", access, shadow.writer, shadow.write_interval, shadow.write_code);
  }
  shadow.constant_interval = interval;
}

void check_byte(Shadow& shadow, const Access& access) {
  const bool writes = is_write(access.kind);
  if (!comes_after_write(shadow, access.shared)) {
    report(writes ? "write after write" : "read after write", access, shadow.writer, shadow.write_interval,
           shadow.write_code);
  }
  if (access.kind == AccessKind::kConstantRead) check_constant_read(shadow, access);
  if (!writes) return remember_read(shadow, access.code);
  if (shadow.constant_interval >= first_of_launch) {
    report("write of what a constant load has read", access, shadow.reader, shadow.read_interval, shadow.read_code);
  }
  const uint32_t earlier = shadow.earlier_block_interval;
  if (!access.shared && earlier >= first_of_launch && earlier < first_of_block) {
    report("write after read", access, shadow.reader, earlier, shadow.read_code);
  }
  if (const uint16_t reader = unordered_reader(shadow, access.shared); reader != kNobody) {
    report("write after read", access, reader, shadow.read_interval, shadow.read_code);
  }
  remember_write(shadow, access.code);
}

}  // namespace

void begin_launch_races() {
  first_of_launch = ++interval;
  if (pages.size() < kMaxKeptPages) return;
  pages.clear();
  last_shadows = nullptr;
}

void begin_block_races(int num_warps) {
  first_of_block = ++interval;
  clocks.assign(num_warps, WarpClock());
}

void order_block() { ++interval; }

void order_warp(int warp, unsigned mask) {
  WarpClock& clock = clocks[warp];
  const uint32_t now = clock.time++;
  if (mask == 0xffffffffu) {
    clock.all_known = now;
    return;
  }
  std::array<uint32_t, kWarpSize> known{};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if ((mask >> lane & 1) == 0) continue;
    for (int other = 0; other < kWarpSize; ++other) known[other] = std::max(known[other], clock.known[lane][other]);
    known[lane] = now;
  }
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (mask >> lane & 1) clock.known[lane] = known;
  }
}

void check_race(const Access& access) {
  for (uintptr_t address = access.address; address < access.address + access.bytes; ++address) {
    check_byte(shadow_of(address), access);
  }
}

}  // namespace emulator
