// The n-gram key: 21 bits a slot, slot 0 highest, token id + 1, and 0 for an absent slot. Keys are positive.
// All of it is constexpr, so that code on the device may call it.
#pragma once

#include <cstdint>

namespace hmi {

constexpr int kBitsPerSlot = 21;
constexpr int kMaxSlots = 3;
constexpr int32_t kMaxTokenId = (1 << kBitsPerSlot) - 2;
constexpr int32_t kAbsent = -1;
constexpr int64_t kNoKey = 0;  // of no n-gram: it marks an empty slot of an index

constexpr bool is_token_id(int32_t id) { return id >= 0 && id <= kMaxTokenId; }

// Slots hold token ids, or kAbsent.
constexpr int64_t ngram_key(int32_t slot0, int32_t slot1, int32_t slot2) {
  return (int64_t{slot0 + 1} << (2 * kBitsPerSlot)) | (int64_t{slot1 + 1} << kBitsPerSlot) | int64_t{slot2 + 1};
}

// Likewise, or kNoKey if a slot holds neither.
constexpr int64_t checked_ngram_key(int32_t slot0, int32_t slot1, int32_t slot2) {
  const bool valid = slot0 >= kAbsent && slot1 >= kAbsent && slot2 >= kAbsent && slot0 <= kMaxTokenId &&
                     slot1 <= kMaxTokenId && slot2 <= kMaxTokenId;
  return valid ? ngram_key(slot0, slot1, slot2) : kNoKey;
}

// A bijection of 64-bit words whose high bits depend on every bit of the key (two rounds of xor-shift and multiply,
// after Pelle Evensen's and Austin Appleby's mixers). The PLOT index is stored with it: it is a file format.
constexpr uint64_t mix_key(int64_t key) {
  uint64_t x = static_cast<uint64_t>(key);
  x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ull;
  return (x ^ (x >> 32)) * 0x9E3779B97F4A7C15ull;
}

}  // namespace hmi
