#include "emulator/tensor_core.h"

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "emulator/collectives.h"
#include "emulator/machine.h"
#include "emulator/memory_access.h"
#include "emulator/shared_memory.h"

namespace emulator {
namespace {

constexpr int kRowBytes = 16;
constexpr int kLanes = 32;

struct RowHand {
  unsigned* to;
  int count;
  bool transposed;
  char row[kRowBytes];
};

// Register m of lane l holds elements (l / 4, 2 * (l % 4)) and the next in the row of matrix m; of its transpose if
// asked.
void distribute(void* const (&hands)[kLanes], unsigned) {
  for (int lane = 0; lane < kLanes; ++lane) {
    const RowHand& receiver = *static_cast<const RowHand*>(hands[lane]);
    for (int matrix = 0; matrix < receiver.count; ++matrix) {
      for (int half = 0; half < 2; ++half) {
        int row = lane / 4, column = 2 * (lane % 4) + half;
        if (receiver.transposed) std::swap(row, column);
        const char* source = static_cast<const RowHand*>(hands[8 * matrix + row])->row + 2 * column;
        std::memcpy(reinterpret_cast<char*>(receiver.to + matrix) + 2 * half, source, 2);
      }
    }
  }
}

float bfloat16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

float float16_value(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide_exponent = exponent == 31 ? 255 : exponent + 112;
  const uint32_t wide = sign | wide_exponent << 23 | mantissa << 13;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

using Converter = float (*)(uint16_t);

// One conversion costs more than the products that use it.
template <Converter convert>
const std::vector<float>& values_of_bits() {
  static const std::vector<float> values = [] {
    std::vector<float> all(1 << 16);
    for (uint32_t bits = 0; bits < all.size(); ++bits) all[bits] = convert(static_cast<uint16_t>(bits));
    return all;
  }();
  return values;
}

struct ProductHand {
  float* sums;
  const unsigned* a;
  const unsigned* b;
};

template <Converter convert>
void multiply(void* const (&hands)[kLanes], unsigned) {
  const float* const values = values_of_bits<convert>().data();
  const auto element = [values](const unsigned* registers, int index) {
    return values[registers[index / 2] >> 16 * (index % 2) & 0xffff];
  };
  float a[16][16], b[16][8], sums[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const ProductHand& hand = *static_cast<const ProductHand*>(hands[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 8; ++i) a[group + 8 * (i / 2 % 2)][pair + i % 2 + 8 * (i / 4)] = element(hand.a, i);
    for (int i = 0; i < 4; ++i) b[pair + i % 2 + 8 * (i / 2)][group] = element(hand.b, i);
    for (int i = 0; i < 4; ++i) sums[group + 8 * (i / 2)][pair + i % 2] = hand.sums[i];
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    float* const to = static_cast<const ProductHand*>(hands[lane])->sums;
    for (int i = 0; i < 4; ++i) to[i] = sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

void require_whole_warp(const char* what, const Place& place) {
  if (machine.grid->num_threads() >= (current->warp() + 1) * kWarpSize) return;
  fail(std::string(what) + " at " + text(place) + " in a warp of less than 32 threads");
}

}  // namespace

void load_matrices(unsigned* to, int count, bool transposed, const void* row, Place place) {
  const Unobserved unobserved;
  require_whole_warp("ldmatrix", place);
  RowHand hand{to, count, transposed, {}};
  if (current->lane() < 8 * count) {
    if (reinterpret_cast<uintptr_t>(row) % kRowBytes != 0) {
      fail("ldmatrix at " + text(place) + ": a row's address is not a multiple of 16 bytes");
    }
    if (!is_shared(row, kRowBytes)) fail("ldmatrix at " + text(place) + ": a row is not in shared memory");
    // Read when this lane gets here, not when the last does: that would hide a missing __syncwarp.
    observe(row, kRowBytes, AccessKind::kMatrixRow, __builtin_return_address(0));
    std::memcpy(hand.row, row, kRowBytes);
  }
  meet_warp(kAllLanes, "ldmatrix", &hand, &distribute, place);
}

void mma_float16(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], Place place) {
  const Unobserved unobserved;
  require_whole_warp("mma", place);
  ProductHand hand{sums, a, b};
  meet_warp(kAllLanes, "mma", &hand, &multiply<float16_value>, place);
}

void mma_bfloat16(float (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2], Place place) {
  const Unobserved unobserved;
  require_whole_warp("mma", place);
  ProductHand hand{sums, a, b};
  meet_warp(kAllLanes, "mma", &hand, &multiply<bfloat16_value>, place);
}

}  // namespace emulator
