// Activation functions over a Vector. NaN in, NaN out. Absolute errors below 1e-6 of the exact function of float32.

namespace hmi {
namespace {

// e^x by x = n ln 2 + r and a polynomial in r (Cephes' expf); saturates beyond float32's normal range.
inline Vector exponential(Vector x) {
  x = minimum(broadcast(88.0f), maximum(broadcast(-87.0f), x));
  const Vector n = round_to_integer(multiply(x, broadcast(1.44269504088896341f)));
  // ln 2 in two parts, so that n * ln 2 loses nothing.
  Vector r = multiply_add(n, broadcast(-0.693359375f), x);
  r = multiply_add(n, broadcast(2.12194440e-4f), r);
  Vector p = broadcast(1.9875691500e-4f);
  p = multiply_add(p, r, broadcast(1.3981999507e-3f));
  p = multiply_add(p, r, broadcast(8.3334519073e-3f));
  p = multiply_add(p, r, broadcast(4.1665795894e-2f));
  p = multiply_add(p, r, broadcast(1.6666665459e-1f));
  p = multiply_add(p, r, broadcast(5.0000001201e-1f));
  p = multiply_add(p, multiply(r, r), add(r, broadcast(1.0f)));
  return multiply(p, power_of_two(n));
}

inline Vector hyperbolic_tangent(Vector x) {
  const Vector e = exponential(multiply(x, broadcast(2.0f)));
  return subtract(broadcast(1.0f), divide(broadcast(2.0f), add(e, broadcast(1.0f))));
}

// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error below 1.5e-7.
inline Vector error_function(Vector x) {
  const Vector size = magnitude(x);
  const Vector t = divide(broadcast(1.0f), multiply_add(size, broadcast(0.3275911f), broadcast(1.0f)));
  Vector p = broadcast(1.061405429f);
  p = multiply_add(p, t, broadcast(-1.453152027f));
  p = multiply_add(p, t, broadcast(1.421413741f));
  p = multiply_add(p, t, broadcast(-0.284496736f));
  p = multiply_add(p, t, broadcast(0.254829592f));
  const Vector tail = exponential(multiply(multiply(size, size), broadcast(-1.0f)));
  return with_sign_of(subtract(broadcast(1.0f), multiply(multiply(p, t), tail)), x);
}

inline Vector half_of_x_times_one_plus(Vector x, Vector y) {
  return multiply(multiply(x, broadcast(0.5f)), add(broadcast(1.0f), y));
}

inline Vector gelu(Vector x) {
  return half_of_x_times_one_plus(x, error_function(multiply(x, broadcast(0.70710678118654752f))));
}

// Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415.
inline Vector gelu_tanh(Vector x) {
  const Vector cube = multiply(multiply(x, x), x);
  const Vector inner = multiply_add(cube, broadcast(0.044715f), x);
  return half_of_x_times_one_plus(x, hyperbolic_tangent(multiply(inner, broadcast(0.79788456080286536f))));
}

inline Vector silu(Vector x) {
  const Vector e = exponential(multiply(x, broadcast(-1.0f)));
  return divide(x, add(e, broadcast(1.0f)));
}

inline Vector relu(Vector x) { return maximum(zero(), x); }

template <Vector (*kFunction)(Vector)>
void apply(float* values, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(values + i, kFunction(load(values + i)));
  const int rest = static_cast<int>(count - i);
  if (rest > 0) store_first(values + i, kFunction(load_first(values + i, rest)), rest);
}

void apply_activation(Activation activation, float* values, int64_t count) {
  switch (activation) {
    case kRelu: return apply<relu>(values, count);
    case kGelu: return apply<gelu>(values, count);
    case kSilu: return apply<silu>(values, count);
    case kGeluTanh: return apply<gelu_tanh>(values, count);
    case kTanh: return apply<hyperbolic_tangent>(values, count);
    default: return;
  }
}

}  // namespace
}  // namespace hmi
