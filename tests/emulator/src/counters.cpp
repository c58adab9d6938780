#include "emulator/counters.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <unordered_map>
#include <unordered_set>

#include "emulator/machine.h"

namespace emulator {
namespace {

constexpr uint32_t kSectorBytes = 32;
constexpr uint32_t kBanks = 32;
constexpr uint32_t kWordBytes = 4;
constexpr std::size_t kPageBytes = 4096;

// Which execution of which instruction. Lanes run one after another here; what they do between two meetings with the
// same instruction for the same time is what hardware does in one step.
struct RequestKey {
  uint32_t code;
  uint32_t meetings;
  uint32_t occurrence;
  bool write;
  bool operator==(const RequestKey& other) const {
    return code == other.code && meetings == other.meetings && occurrence == other.occurrence && write == other.write;
  }
};

struct HashKey {
  template <class Key>
  std::size_t operator()(const Key& key) const {
    return (std::size_t{key.code} * 0x9e3779b97f4a7c15ull) ^ (std::size_t{key.meetings} << 33) ^
           (std::size_t{key.occurrence} << 1) ^ key.write;
  }
};

struct Request {
  uint32_t lanes = 0;
  uint32_t bytes = 0;
  AccessKind kind = AccessKind::kRead;
  bool shared = false;
  std::array<uintptr_t, kWarpSize> addresses;
};

// How often a lane has executed each instruction since its last meeting.
struct LaneHistory {
  uint32_t meetings = 0;
  std::unordered_map<uint64_t, uint32_t> occurrences;
};

class ByteSet {
 public:
  void add(uintptr_t address, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) pages_[(address + i) / kPageBytes].set((address + i) % kPageBytes);
  }
  uint64_t size() const {
    uint64_t total = 0;
    for (const auto& [page, bytes] : pages_) total += bytes.count();
    return total;
  }

 private:
  std::unordered_map<uintptr_t, std::bitset<kPageBytes>> pages_;
};

// One for reads, one for writes.
struct Direction {
  ByteSet touched;                             // in the launch
  std::unordered_set<uintptr_t> block_sectors;
};

std::vector<LaunchCounters> finished;
LaunchCounters counters;
std::array<Direction, 2> directions;
std::vector<LaneHistory> histories;                                          // by thread
std::vector<std::unordered_map<RequestKey, Request, HashKey>> open_requests;  // by warp

void count_global(uint32_t code, const Request& request) {
  std::array<uintptr_t, 2 * kWarpSize> sectors;
  std::size_t count = 0;
  Direction& direction = directions[is_write(request.kind)];
  GlobalTraffic& traffic = is_write(request.kind) ? counters.writes : counters.reads;
  for (uint32_t lanes = request.lanes; lanes != 0; lanes &= lanes - 1) {
    const uintptr_t address = request.addresses[__builtin_ctz(lanes)];
    direction.touched.add(address, request.bytes);
    sectors[count++] = address / kSectorBytes;
    sectors[count++] = (address + request.bytes - 1) / kSectorBytes;
  }
  std::sort(sectors.begin(), sectors.begin() + count);
  count = std::unique(sectors.begin(), sectors.begin() + count) - sectors.begin();
  traffic.sector_bytes += count * kSectorBytes;
  counters.global_sector_bytes[code] += count * kSectorBytes;
  for (std::size_t i = 0; i < count; ++i) {
    if (direction.block_sectors.insert(sectors[i]).second) traffic.block_bytes += kSectorBytes;
  }
}

// A wavefront gives every bank one word: the most distinct words that a bank must give. Lanes that want the same word
// are served together.
uint32_t conflict_degree(const Request& request, uint32_t first_lane, uint32_t num_lanes) {
  std::array<std::vector<uintptr_t>, kBanks> words;
  std::size_t degree = 0;
  for (uint32_t lane = first_lane; lane < first_lane + num_lanes; ++lane) {
    if ((request.lanes >> lane & 1) == 0) continue;
    const uintptr_t first = request.addresses[lane] / kWordBytes;
    const uintptr_t last = (request.addresses[lane] + request.bytes - 1) / kWordBytes;
    for (uintptr_t word = first; word <= last; ++word) {
      auto& of_bank = words[word % kBanks];
      if (std::find(of_bank.begin(), of_bank.end(), word) == of_bank.end()) of_bank.push_back(word);
      degree = std::max(degree, of_bank.size());
    }
  }
  return static_cast<uint32_t>(degree);
}

// Hardware serves 128 bytes at a time: 32 lanes of 4 bytes, 16 of 8, 8 of 16 (which also are the rows of one matrix
// of ldmatrix).
void count_shared(uint32_t code, const Request& request) {
  SharedTraffic& traffic = counters.shared[code];
  ++traffic.requests;
  const uint32_t lanes = request.bytes <= 4 ? 32 : request.bytes <= 8 ? 16 : 8;
  for (uint32_t first = 0; first < kWarpSize; first += lanes) {
    const uint32_t degree = conflict_degree(request, first, lanes);
    traffic.wavefronts += degree;
    traffic.fewest += degree > 0;
    traffic.worst_degree = std::max(traffic.worst_degree, degree);
  }
}

void count_request(uint32_t code, const Request& request) {
  request.shared ? count_shared(code, request) : count_global(code, request);
}

RequestKey key_of(const Access& access) {
  LaneHistory& history = histories[current->number];
  if (history.meetings != current->meetings) {
    history.meetings = current->meetings;
    history.occurrences.clear();
  }
  const bool write = is_write(access.kind);
  return {access.code, current->meetings, history.occurrences[uint64_t{access.code} << 1 | write]++, write};
}

}  // namespace

void begin_launch_counters() {
  counters = LaunchCounters();
  directions = {};
  counters.kernel = code_offset(machine.grid->kernel);
  counters.blocks = machine.grid->num_blocks();
  histories.assign(machine.grid->num_threads(), LaneHistory());
  open_requests.assign(machine.grid->num_warps(), {});
}

void count_access(const Access& access) {
  const RequestKey key = key_of(access);
  auto& requests = open_requests[current->warp()];
  Request& request = requests[key];
  request.lanes |= 1u << current->lane();
  request.bytes = std::max(request.bytes, access.bytes);
  request.kind = access.kind;
  request.shared = access.shared;
  request.addresses[current->lane()] = access.address;
  if (request.lanes != 0xffffffffu) return;
  count_request(access.code, request);
  requests.erase(key);
}

// What is left are requests that some lanes took no part in.
void end_block_counters() {
  for (auto& requests : open_requests) {
    for (const auto& [key, request] : requests) count_request(key.code, request);
    requests.clear();
  }
  for (LaneHistory& history : histories) history = LaneHistory();
  for (Direction& direction : directions) direction.block_sectors.clear();
}

void end_launch_counters() {
  if (!machine.settings.count_accesses) return;
  counters.reads.distinct_bytes = directions[0].touched.size();
  counters.writes.distinct_bytes = directions[1].touched.size();
  finished.push_back(std::move(counters));
}

const std::vector<LaunchCounters>& launch_counters() { return finished; }
void forget_counters() { finished.clear(); }

}  // namespace emulator
