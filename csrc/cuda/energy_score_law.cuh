// The closed form of one sample: from sums over dimensions to the value and the slopes.
//
// With delta = x - mean, r = s^2 / sum s^2, mu = sum (delta^2 + s^2), e = delta^2 / mu and
// w = s^2 / mu = share * r, everything that a sample needs is sum delta^2 r^j, j = 0..3, because
// share is a factor of its own; the powers of r are summed once a position. The slopes are cubics
// in w. Specification: calm_kernels/reference/expected_distance_gradient.py.
#pragma once

#include "cuda/energy_score_types.cuh"

namespace calm {

// square^a and its slope alpha square^(a-1) over the distance, as power_of_square and
// slope_of_power define them, from one power.
template <typename T>
struct PowerAndSlope {
  T power;
  T slope;
};
template <typename T>
__device__ inline PowerAndSlope<T> power_and_slope(T square, const PowerConstants<T>& constants) {
  if (square == T(0)) return {T(0), T(0)};
  T divided =
      constants.a == T(0.5) ? inverse_square_root(square) : power(square, constants.a - T(1));
  divided = divided > largest(T(0)) / T(2) ? largest(T(0)) / T(2) : divided;
  const T poison = square - square;
  return {divided * square + poison, constants.alpha * divided + poison};
}

// Sums over dimensions that the samples of a position share.
template <typename T>
struct SpreadSums {
  T trace;   // sum s^2
  T second;  // sum r^2
  T third;   // sum r^3
  T fourth;  // sum r^4
};

// 1 / trace, or 0 where s^2 is too small for a quotient: such a law has no spread.
__device__ inline float inverse_trace(float trace) {
  return trace < 1.17549435e-38f ? 0.0f : 1.0f / trace;
}
__device__ inline double inverse_trace(double trace) {
  return trace < 2.2250738585072014e-308 ? 0.0 : 1.0 / trace;
}

template <typename T>
struct SampleLaw {
  T mu;
  T power;             // mu^a
  T inverse_distance;  // mu^(-1/2); used twice in place of 1 / mu, which may overflow
  T share;             // trace / mu
  LawMoments<T> moments;
};

// `sums` are sum delta^2 r^j.
template <typename T>
__device__ inline SampleLaw<T> sample_law(const T (&sums)[4], const SpreadSums<T>& spread, T a) {
  SampleLaw<T> law;
  law.mu = sums[0] + spread.trace;
  law.inverse_distance = law.mu == T(0) ? T(1) : inverse_square_root(law.mu);
  law.power = a == T(0.5) ? law.mu * law.inverse_distance : power_of_square(law.mu, a);
  const T inverse = law.inverse_distance;
  const T share = spread.trace * inverse * inverse;
  const T share2 = share * share;
  law.share = share;
  law.moments.rho = T(2) * share2 * spread.second + T(4) * share * (sums[1] * inverse * inverse);
  law.moments.third =
      T(8) * share2 * share * spread.third + T(24) * share2 * (sums[2] * inverse * inverse);
  law.moments.fourth = T(48) * share2 * share2 * spread.fourth +
                       T(192) * share2 * share * (sums[3] * inverse * inverse);
  return law;
}

constexpr int kMaxNodes = 16;
constexpr int kNodeBatch = 4;  // nodes summed together
// Elements whose factors 1 + 2 t w share a logarithm: a factor is at most 3e7, so four stay in
// range of a float.
constexpr int kFactorsPerLog = 4;

// What the nodes add to F.
template <typename T>
struct NodeCorrection {
  T value;
  T rho;
  T projection;  // sum_d (e F_e + w F_w)
};

// One node: its share of the correction. Its part of F_e is `strength` / (1 + 2 t w).
template <typename T>
struct NodeTerm {
  NodeCorrection<T> correction;
  T strength;
};

// `log_actual` is the logarithm of Q's Laplace transform at t, `projection` is
// sum_d (e + w (1 - 2 t e / (1 + 2 t w))) / (1 + 2 t w).
template <typename T>
__device__ inline NodeTerm<T> node_term(T t, T weight, T rho, T log_actual, T projection) {
  const T log_matched = -log_one_plus(t * rho) / rho;
  const T matched = weight * exponential(log_matched);
  const T actual = weight * exponential(log_actual);
  const T strength = t * actual;
  return {{matched - actual, -matched * (log_matched + t / (T(1) + t * rho)) / rho,
           strength * projection},
          strength};
}

// d (weight mu^a F) / d e_d = c[0] + c[1] w + c[2] w^2 + c[3] w^3 (+ scale F_e of the nodes), times
// mu^a's homogeneity: the gradient in delta_d is this times delta_d / mu.
template <typename T>
struct SlopePolynomial {
  T c[4];
  T scale;
};

template <typename T>
__device__ inline SlopePolynomial<T> slope_polynomial(const SampleLaw<T>& law,
                                                      const MomentFactor<T>& factor, T projection,
                                                      T weight, T a) {
  const T scale = weight * T(2) * law.power;
  const T homogeneous = a * factor.value - T(2) * law.moments.rho * factor.rho -
                        T(3) * law.moments.third * factor.third -
                        T(4) * law.moments.fourth * factor.fourth - projection;
  return {{scale * homogeneous, T(4) * scale * factor.rho, T(24) * scale * factor.third,
           T(192) * scale * factor.fourth},
          scale};
}

// Slopes of one element without nodes: in e, and what is added to it for the slope in w.
template <typename T>
__device__ inline T slope_in_e(const T (&c)[4], T w) {
  return ((c[3] * w + c[2]) * w + c[1]) * w + c[0];
}
template <typename T>
__device__ inline T slope_in_w_over_e(const T (&c)[4], T w) {
  return (T(3) * c[3] * w + T(2) * c[2]) * w + c[1];
}

}  // namespace calm
