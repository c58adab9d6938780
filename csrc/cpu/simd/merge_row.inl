// Sums the rows that make one token's hidden state, adds its position and normalizes the result.

namespace hmi {
namespace {

constexpr int kUnroll = 4;  // independent sums, enough to hide the latency of an addition

template <class Element>
inline Vector load_some(const void* row, int64_t at, int count) {
  const Element* from = static_cast<const Element*>(row) + at;
  return count == kLanes ? load(from) : load_first(from, count);
}

inline Vector load_source(const MergeSource& source, int64_t at, int count) {
  return source.is_half ? load_some<uint16_t>(source.row, at, count) : load_some<float>(source.row, at, count);
}

inline Vector sum_sources(const MergeArguments& a, int64_t at, int count) {
  Vector total = load_source(a.sources[0], at, count);
  const int last = a.num_sources - 1;
  for (int s = 1; s < last; ++s) total = add(total, load_source(a.sources[s], at, count));
  if (last > 0) {
    const Vector value = load_source(a.sources[last], at, count);
    total = a.subtract_last ? subtract(total, value) : add(total, value);
  }
  return add(total, load_some<float>(a.position, at, count));
}

// Calls body(position, number of lanes, which of kUnroll sums) over the whole row.
template <class Body>
inline void for_each_vector(int64_t size, Body body) {
  int64_t at = 0;
  for (; at + kUnroll * kLanes <= size; at += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kUnroll; ++i) body(at + i * kLanes, kLanes, i);
  }
  for (; at < size; at += kLanes) body(at, size - at < kLanes ? static_cast<int>(size - at) : kLanes, 0);
}

inline float total(const Vector (&sums)[kUnroll]) { return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3]))); }

inline void store_some(float* to, Vector value, int count) {
  count == kLanes ? store(to, value) : store_first(to, value, count);
}

void merge_row(const MergeArguments& a) {
  float* output = a.output;
  Vector sums[kUnroll] = {zero(), zero(), zero(), zero()};
  for_each_vector(a.hidden_size, [&](int64_t at, int count, int i) {
    const Vector value = sum_sources(a, at, count);
    store_some(output + at, value, count);
    sums[i] = add(sums[i], value);
  });
  const Vector mean = broadcast(total(sums) / static_cast<float>(a.hidden_size));

  // The variance from the deviations, in a second pass: the difference of squares would cancel.
  Vector squares[kUnroll] = {zero(), zero(), zero(), zero()};
  for_each_vector(a.hidden_size, [&](int64_t at, int count, int i) {
    const Vector deviation = keep_first(subtract(load_some<float>(output, at, count), mean), count);
    squares[i] = multiply_add(deviation, deviation, squares[i]);
  });
  const float variance = total(squares) / static_cast<float>(a.hidden_size);
  const Vector factor = broadcast(1.0f / __builtin_sqrtf(variance + a.epsilon));

  for_each_vector(a.hidden_size, [&](int64_t at, int count, int) {
    const Vector normal = multiply(subtract(load_some<float>(output, at, count), mean), factor);
    const Vector weight = load_some<float>(a.weight, at, count);
    const Vector bias = load_some<float>(a.bias, at, count);
    store_some(output + at, multiply_add(normal, weight, bias), count);
  });
}

}  // namespace
}  // namespace hmi
