// Sequences laid end to end without padding: sequence s is input_ids[offsets[s] : offsets[s + 1]].
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace hmi {

// Throws std::invalid_argument unless offsets [num_sequences + 1] run from 0 to num_rows and do not decrease.
inline void check_offsets(const char* name, const int64_t* offsets, int64_t num_sequences, int64_t num_rows) {
  if (offsets[0] != 0 || offsets[num_sequences] != num_rows) {
    throw std::invalid_argument(std::string(name) + " must run from 0 to the number of tokens " +
                                std::to_string(num_rows) + ", got " + std::to_string(offsets[0]) + " to " +
                                std::to_string(offsets[num_sequences]));
  }
  for (int64_t s = 0; s < num_sequences; ++s) {
    if (offsets[s] > offsets[s + 1]) {
      throw std::invalid_argument(std::string(name) + " must not decrease, but entry " + std::to_string(s + 1) +
                                  " is smaller than the one before");
    }
  }
}

struct PackedSequences {
  const int32_t* input_ids;
  const int64_t* offsets;  // [num_sequences + 1], first 0, last num_tokens, non-decreasing
  int64_t num_sequences;
  int64_t num_tokens;

  // Throws std::invalid_argument if the offsets do not describe num_tokens tokens.
  void check() const { check_offsets("sequence_offsets", offsets, num_sequences, num_tokens); }

  // The sequence that holds the token (empty sequences hold none).
  int64_t sequence_of(int64_t token) const {
    return std::upper_bound(offsets, offsets + num_sequences + 1, token) - offsets - 1;
  }
};

}  // namespace hmi
