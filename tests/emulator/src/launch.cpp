// The limits of a launch that compute capabilities 8.0 and 9.0 share.
#include "emulator/launch.h"

#include <stdexcept>
#include <string>

namespace emulator {
namespace {

constexpr std::size_t kSharedOfSm80 = 163 << 10;
constexpr std::size_t kSharedOfSm90 = 227 << 10;
constexpr std::size_t kParameterBytes = 4 << 10;

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("launch refused: " + what);
}

std::string text(const dim3& extent) {
  return std::to_string(extent.x) + " x " + std::to_string(extent.y) + " x " + std::to_string(extent.z);
}

}  // namespace

void require_launchable(const Grid& grid, std::size_t parameter_bytes) {
  const dim3& threads = grid.threads;
  require(threads.x > 0 && threads.y > 0 && threads.z > 0, "a block of " + text(threads) + " threads");
  require(threads.x <= kMaxThreads && threads.y <= kMaxThreads && threads.z <= 64 &&
              std::size_t(threads.x) * threads.y * threads.z <= kMaxThreads,
          "a block of " + text(threads) + " threads; 1,024 are the most (64 in z)");
  require(grid.blocks.x <= 0x7fffffffu && grid.blocks.y <= 65535 && grid.blocks.z <= 65535,
          "a grid of " + text(grid.blocks) + " blocks; 2^31 - 1 x 65,535 x 65,535 are the most");
  const std::size_t limit = machine.settings.allow_sm90_shared ? kSharedOfSm90 : kSharedOfSm80;
  require(grid.shared_bytes <= limit, std::to_string(grid.shared_bytes) + " bytes of dynamic shared memory; " +
                                          std::to_string(limit) + " are the most here");
  require(parameter_bytes <= kParameterBytes,
          std::to_string(parameter_bytes) + " bytes of kernel parameters; 4,096 are the most");
}

}  // namespace emulator
