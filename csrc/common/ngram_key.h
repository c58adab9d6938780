// The n-gram key: 21 bits a slot, slot 0 highest, token id + 1, and 0 for an absent slot. Keys are positive.
#pragma once

#include <cstdint>

namespace hmi {

constexpr int kBitsPerSlot = 21;
constexpr int kMaxSlots = 3;
constexpr int32_t kMaxTokenId = (1 << kBitsPerSlot) - 2;
constexpr int32_t kAbsent = -1;

inline bool is_token_id(int32_t id) { return id >= 0 && id <= kMaxTokenId; }

// Slots hold token ids, or kAbsent.
inline int64_t ngram_key(int32_t slot0, int32_t slot1, int32_t slot2) {
  return (int64_t{slot0 + 1} << (2 * kBitsPerSlot)) | (int64_t{slot1 + 1} << kBitsPerSlot) | int64_t{slot2 + 1};
}

// A bijection of 64-bit words whose high bits depend on every bit of the key (two rounds of xor-shift and multiply,
// after Pelle Evensen's and Austin Appleby's mixers). The PLOT index is stored with it: it is a file format.
inline uint64_t mix_key(int64_t key) {
  uint64_t x = static_cast<uint64_t>(key);
  x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ull;
  return (x ^ (x >> 32)) * 0x9E3779B97F4A7C15ull;
}

}  // namespace hmi
