// Softmax over the rows of a dense matrix, in place.

namespace hmi {
namespace {

// The largest value; NaN is left to the sum that follows.
inline float highest_of(const float* values, int64_t count) {
  float lanes[kLanes];
  Vector highest = broadcast(values[0]);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) highest = maximum(highest, load(values + i));
  store(lanes, highest);
  float result = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) result = lanes[lane] > result ? lanes[lane] : result;
  for (; i < count; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

// e^(scale * (x - highest)): the difference is taken first, so that the highest itself gives exactly 1.
inline Vector exponential_below(Vector x, Vector highest, Vector scale) {
  return exponential(multiply(subtract(x, highest), scale));
}

void softmax_rows(float* values, int64_t num_rows, int64_t columns, float scale) {
  for (int64_t row = 0; row < num_rows; ++row, values += columns) {
    const Vector highest = broadcast(highest_of(values, columns));
    Vector total = zero();
    int64_t i = 0;
    for (; i + kLanes <= columns; i += kLanes) {
      const Vector e = exponential_below(load(values + i), highest, broadcast(scale));
      total = add(total, e);
      store(values + i, e);
    }
    const int rest = static_cast<int>(columns - i);
    if (rest > 0) {
      const Vector e = exponential_below(load_first(values + i, rest), highest, broadcast(scale));
      total = add(total, keep_first(e, rest));
      store_first(values + i, e, rest);
    }
    const Vector factor = broadcast(1.0f / sum(total));
    for (i = 0; i + kLanes <= columns; i += kLanes) store(values + i, multiply(load(values + i), factor));
    if (rest > 0) store_first(values + i, multiply(load_first(values + i, rest), factor), rest);
  }
}

}  // namespace
}  // namespace hmi
