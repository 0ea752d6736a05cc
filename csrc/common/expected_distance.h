// E ||offset + std * eps||^alpha for eps ~ N(0, I), from the moments of Q = ||offset + std *
// eps||^2.
//
// Q is matched by a Gamma law with its mean and variance; the third and fourth cumulant correct it,
// or, where they do not suffice, a quadrature of 8 or 16 nodes over the two Laplace transforms. The
// specification, its derivation and its error bound: calm_kernels/reference/expected_distance.py
// and expected_distance_gradient.py.
#pragma once

#include <cmath>

#include "common/host_device.h"

namespace calm {

// Nodes t and weights of the moment integral; weights include a / Gamma(1-a) t^-a.
template <typename T>
struct MomentRule {
  int count;
  T t[16];
  T weight[16];
};

// What depends on alpha alone, computed once a call on the host.
template <typename T>
struct PowerConstants {
  T alpha;
  T a;                // alpha / 2
  T third_series;     // a (a-1) (a-2) / 6
  T fourth_series;    // (a-3) / 4
  T gamma_series[4];  // of ln[Gamma(w + (1+a)/2) / Gamma(w + (1-a)/2)] in w^-2
  MomentRule<T> eight;
  MomentRule<T> sixteen;
};

inline constexpr int kGammaShift = 8;
inline constexpr double kEightNodesRho = 0.2;
inline constexpr double kSeriesRho = 0.2;
inline constexpr double kSeriesTolerance = 1e-6;
inline constexpr double kSeriesSafety = 12.0;

template <typename T>
MomentRule<T> moment_rule(int count, double first, double step, double bend, double a) {
  MomentRule<T> rule{};
  rule.count = count;
  for (int j = 0; j < count; ++j) {
    const double u = first + j * step;
    const double stretch = std::exp(u - bend);
    const double t = std::exp(u) * (1.0 + stretch);
    const double spacing = step * (1.0 + stretch / (1.0 + stretch));
    double weight = spacing;
    // The ends carry the geometric series of what lies beyond them.
    if (j == 0) weight += spacing / std::expm1((3.0 - a) * spacing);
    if (j == count - 1) weight += spacing / std::expm1((a + 0.5) * spacing);
    rule.t[j] = static_cast<T>(t);
    rule.weight[j] = static_cast<T>(weight * a / std::tgamma(1.0 - a) * std::pow(t, -a));
  }
  return rule;
}

template <typename T>
PowerConstants<T> power_constants(double alpha) {
  const double a = alpha / 2.0;
  PowerConstants<T> constants{};
  constants.alpha = static_cast<T>(alpha);
  constants.a = static_cast<T>(a);
  constants.third_series = static_cast<T>(a * (a - 1.0) * (a - 2.0) / 6.0);
  constants.fourth_series = static_cast<T>((a - 3.0) / 4.0);
  // Bernoulli polynomials of odd degree n + 1 at (1 + a) / 2, expanded around 1/2.
  const double bernoulli[5] = {1.0, 1.0 / 6.0, -1.0 / 30.0, 1.0 / 42.0, -1.0 / 30.0};
  for (int i = 0; i < 4; ++i) {
    const int n = 2 * (i + 1);
    double polynomial = 0.0;
    double binomial = 1.0;  // (n + 1 choose k)
    for (int k = 0; k <= n; ++k) {
      if (k % 2 == 0) {
        polynomial += binomial * (std::pow(2.0, 1 - k) - 1.0) * bernoulli[k / 2] *
                      std::pow(a / 2.0, n + 1 - k);
      }
      binomial = binomial * (n + 1 - k) / (k + 1);
    }
    constants.gamma_series[i] = static_cast<T>(-2.0 * polynomial / (n * (n + 1)));
  }
  constants.eight = moment_rule<T>(8, -1.85, 0.845, 4.7, a);
  constants.sixteen = moment_rule<T>(16, -2.45, 0.926, 6.4, a);
  return constants;
}

CALM_HOST_DEVICE inline float square_root(float x) { return sqrtf(x); }
CALM_HOST_DEVICE inline double square_root(double x) { return sqrt(x); }
CALM_HOST_DEVICE inline float exponential(float x) { return expf(x); }
CALM_HOST_DEVICE inline double exponential(double x) { return exp(x); }
CALM_HOST_DEVICE inline float log_one_plus(float x) { return log1pf(x); }
CALM_HOST_DEVICE inline double log_one_plus(double x) { return log1p(x); }
CALM_HOST_DEVICE inline float absolute(float x) { return fabsf(x); }
CALM_HOST_DEVICE inline double absolute(double x) { return fabs(x); }
CALM_HOST_DEVICE inline float power(float x, float p) { return p == 0.5f ? sqrtf(x) : powf(x, p); }
CALM_HOST_DEVICE inline double power(double x, double p) { return p == 0.5 ? sqrt(x) : pow(x, p); }
// x / y for y of ordinary size: on a GPU two instructions and 2 ulp, elsewhere exact.
CALM_HOST_DEVICE inline float quotient(float x, float y) {
#ifdef __CUDA_ARCH__
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(y));
  return x * inverse;
#else
  return x / y;
#endif
}
CALM_HOST_DEVICE inline double quotient(double x, double y) { return x / y; }
CALM_HOST_DEVICE inline float largest(float) { return 3.402823466e38f; }
CALM_HOST_DEVICE inline double largest(double) { return 1.7976931348623157e308; }

// Whether x is neither infinite nor NaN, without a library call that device code lacks.
template <typename T>
CALM_HOST_DEVICE inline bool is_finite(T x) {
  return x - x == T(0);
}

// square^a: 0 at 0, NaN where square is not finite.
template <typename T>
CALM_HOST_DEVICE inline T power_of_square(T square, T a) {
  if (square == T(0)) return T(0);
  return power(square, a) + (square - square);
}

// alpha square^(alpha/2 - 1), the slope of ||.||^alpha over the distance: 0 at 0, NaN where square
// is not finite, never overflowing.
template <typename T>
CALM_HOST_DEVICE inline T slope_of_power(T square, const PowerConstants<T>& constants) {
  if (square == T(0)) return T(0);
  T slope = constants.a == T(0.5) ? constants.alpha / square_root(square)
                                  : constants.alpha * power(square, constants.a - T(1));
  slope = slope > largest(T(0)) ? largest(T(0)) : slope;
  return slope + (square - square);
}

// Cumulants of Q divided by powers of its mean.
template <typename T>
struct LawMoments {
  T rho;     // variance / mu^2, in [0, 2]
  T third;   // third cumulant / mu^3
  T fourth;  // fourth cumulant / mu^4
};

// F = E Q^a / mu^a and its derivatives; `nodes` more have to be added where that is not 0.
template <typename T>
struct MomentFactor {
  T value;
  T rho;
  T third;
  T fourth;
  int nodes;
};

// E G^a / (E G)^a of a Gamma law with variance / mean^2 = rho, and its logarithmic slope in rho.
template <typename T>
CALM_HOST_DEVICE inline void gamma_moment_ratio(T rho, const PowerConstants<T>& constants, T& ratio,
                                                T& log_slope) {
  const T a = constants.a;
  const T shift = T(kGammaShift) - T(0.5) * (T(1) - a);
  const T w = T(1) + shift * rho;
  T numerator = T(1);
  T denominator = T(1);
  T slope = quotient(a * shift, w);
  for (int j = 0; j < kGammaShift; ++j) {
    const T upper = T(1) + T(j) * rho;
    const T lower = T(1) + (T(j) + a) * rho;
    numerator *= upper;
    denominator *= lower;
    slope -= quotient(a, upper * lower);
  }
  const T* c = constants.gamma_series;
  const T relative = quotient(rho, w);
  const T x = relative * relative;
  ratio = power(w, a) * quotient(numerator, denominator) *
          exponential(x * (c[0] + x * (c[1] + x * (c[2] + x * c[3]))));
  log_slope = slope + quotient(T(2) * rho, w * w * w) *
                          (c[0] + x * (T(2) * c[1] + x * (T(3) * c[2] + x * (T(4) * c[3]))));
}

// The Gamma law with its series correction, or without it where nodes have to serve.
template <typename T>
CALM_HOST_DEVICE inline MomentFactor<T> moment_factor(const LawMoments<T>& law,
                                                      const PowerConstants<T>& constants) {
  const T a = constants.a;
  const T rho = law.rho > T(kSeriesRho) ? T(kSeriesRho) : law.rho;
  // Coefficients of the excess third and fourth cumulant over the Gamma law's.
  const T d1 = T(1) - (T(1) - a) * rho;
  const T d2 = T(1) - (T(2) - a) * rho;
  const T d3 = T(1) - (T(3) - a) * rho;
  const T d4 = T(1) - (T(4) - a) * rho;
  const T c3 = quotient(constants.third_series, d1 * d2 * d3);
  const T c4 = quotient(c3 * constants.fourth_series, d4);
  const T skewness = c3 * (law.third - T(2) * rho * rho);
  const T kurtosis = c4 * (law.fourth - T(6) * rho * rho * rho);
  // Terms shrink by about b, the share of the dimensions that dominate the fourth cumulant.
  const T b = law.fourth / (T(6) * (law.third == T(0) ? T(1) : law.third));
  const T neglected = T(kSeriesSafety) * b * (absolute(kurtosis) + b * absolute(skewness));
  const bool series_fails = neglected > T(kSeriesTolerance) || law.rho > T(kSeriesRho);

  T matched;
  T log_slope;
  gamma_moment_ratio(law.rho, constants, matched, log_slope);
  if (series_fails) {
    return {matched, matched * log_slope, T(0), T(0), law.rho > T(kEightNodesRho) ? 16 : 8};
  }
  const T slope3 = quotient(T(1) - a, d1) + quotient(T(2) - a, d2) + quotient(T(3) - a, d3);
  const T slope4 = slope3 + quotient(T(4) - a, d4);
  const T series = T(1) + skewness + kurtosis;
  const T series_rho = slope3 * skewness + slope4 * kurtosis - rho * (T(4) * c3 + T(18) * rho * c4);
  return {matched * series, matched * (log_slope * series + series_rho), matched * c3, matched * c4,
          0};
}

}  // namespace calm
