// Values that live on the device (offsets, slots, ids) cannot be checked before a launch without waiting for the
// device. The kernels check them instead: what is out of bounds is neither read nor written, and the fault word, eight
// bytes of mapped host memory, says what was wrong. hmi_kernels reads it at its next call and raises.
#pragma once

#include <cstdint>

namespace hmi::cuda {

// Which argument of which op; hmi_kernels/cuda/faults.py has the texts.
enum class Fault : uint64_t {
  kNone,
  kSegmentOffsets,     // position: segment
  kSegmentSlots,       // position: segment
  kSlotOffsets,        // position: slot
  kSlotRanks,          // position: slot
  kSlotActivations,    // position: slot
  kSequenceOffsets,    // position: sequence
  kChains,             // position: sequence
  kInputIds,           // position: token
  kReferences,         // position: token
  kUnigramTables,      // position: sequence
  kPositions,          // position: sequence, which has more tokens than there are positions
  kSlotMatrices,       // position: slot
};

// The fault word: kind << 48 | position.
constexpr unsigned long long fault_word(Fault kind, int64_t position) {
  return static_cast<unsigned long long>(kind) << 48 |
         (static_cast<unsigned long long>(position) & ((1ull << 48) - 1));
}

}  // namespace hmi::cuda
