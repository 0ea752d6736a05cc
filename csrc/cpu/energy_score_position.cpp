// The energy score of one position, in vector lanes.
//
// Work at D dimensions, N samples, M targets: pairs N(N-1)/2 * D differences, targets N * M * D,
// the closed form 2 * N * D multiply-adds and one Gamma ratio a sample. All rows of a position (N *
// D * 4 bytes, 4 KiB at N=8, D=128) stay in L1, so the score reads its inputs once from memory.
//
// Lanes are GNU vectors of 64 bytes: one register with AVX-512, two with AVX2, four without either.
// Sums run over lanes first and across them last, in an order that nothing changes: the same bits
// for any number of threads.

#include "cpu/energy_score_position.h"

#include <algorithm>
#include <limits>

#include "cpu/lanes.h"
#include "cpu/multiversion.h"
#include "cpu/normal.h"

namespace calm {
namespace {

template <typename T>
CALM_INLINE T squared_distance(const T* a, const T* b, int64_t num_vectors) {
  Vector<T> sum{};
  for (int64_t i = 0; i < num_vectors; ++i) {
    const Vector<T> difference = vectors(a)[i] - vectors(b)[i];
    sum += difference * difference;
  }
  return sum_lanes<T>(sum);
}

template <typename T>
CALM_INLINE T pair_term(const EnergyPosition<T>& position, const PowerConstants<T>& constants) {
  const int64_t n = position.num_samples;
  const int64_t num_vectors = position.padded / Lanes<T>::kCount;
  const T weight = T(2) / static_cast<T>(n * (n - 1));
  T total = 0;
  for (int64_t i = 0; i < n; ++i) {
    position.pair_weights[i * n + i] = 0;
    for (int64_t k = i + 1; k < n; ++k) {
      const T square = squared_distance(position.samples + i * position.padded,
                                        position.samples + k * position.padded, num_vectors);
      total += power_of_square(square, constants.a);
      const T slope = weight * slope_of_power(square, constants);
      position.pair_weights[i * n + k] = slope;
      position.pair_weights[k * n + i] = slope;
    }
  }
  if (position.grad_samples != nullptr) {
    // Sample by sample over its partners: the gradient row is written once.
    for (int64_t i = 0; i < n; ++i) {
      const Vector<T>* own = vectors(position.samples + i * position.padded);
      Vector<T>* grad = vectors(position.grad_samples + i * position.padded);
      for (int64_t v = 0; v < num_vectors; ++v) {
        Vector<T> sum{};
        for (int64_t k = 0; k < n; ++k) {
          sum += position.pair_weights[i * n + k] *
                 (own[v] - vectors(position.samples + k * position.padded)[v]);
        }
        grad[v] += sum;
      }
    }
  }
  return total * weight;
}

// The moments of Q for one sample from sums over dimensions; r = s^2 / sum s^2.
template <typename T>
struct SpreadSums {
  T trace;   // sum s^2
  T second;  // sum r^2
  T third;   // sum r^3
  T fourth;  // sum r^4
};

template <typename T>
struct NodeCorrection {
  T value;
  T rho;
  T projection;  // sum_d (e F_e + w F_w)
};

// What the nodes add to F; F_e and F_w are written to rows e_slope and w_slope.
template <typename T>
CALM_INLINE NodeCorrection<T> node_correction(const EnergyPosition<T>& position, const T* offset,
                                              const T* relative, T inverse_distance, T share, T rho,
                                              const MomentRule<T>& rule, T* e_slope, T* w_slope) {
  const int64_t num_vectors = position.padded / Lanes<T>::kCount;
  // A factor 1 + 2 t w is at most 3e7: four of them stay in range of a float.
  constexpr int64_t kFactorsPerLog = 4;
  NodeCorrection<T> correction{};
  for (int64_t v = 0; v < num_vectors; ++v) {
    vectors(e_slope)[v] = Vector<T>{};
    vectors(w_slope)[v] = Vector<T>{};
  }
  for (int j = 0; j < rule.count; ++j) {
    const T t = rule.t[j];
    T log_actual = 0;
    for (int64_t start = 0; start < num_vectors; start += kFactorsPerLog) {
      const int64_t end =
          start + kFactorsPerLog < num_vectors ? start + kFactorsPerLog : num_vectors;
      // 1 + excess is the product of the factors 1 + 2 t w; the excess alone keeps small w.
      Vector<T> excess{};
      Vector<T> damped{};
      for (int64_t v = start; v < end; ++v) {
        const Vector<T> direction = vectors(offset)[v] * inverse_distance;
        const Vector<T> x = (T(2) * t * share) * vectors(relative)[v];
        excess += x * (T(1) + excess);
        damped += direction * direction / (T(1) + x);
      }
      log_actual -= T(0.5) * sum_of_logs_one_plus<T>(excess) + t * sum_lanes<T>(damped);
    }
    const T log_matched = -log_one_plus(t * rho) / rho;
    const T matched = rule.weight[j] * exponential(log_matched);
    const T actual = rule.weight[j] * exponential(log_actual);
    correction.value += matched - actual;
    correction.rho -= matched * (log_matched + t / (T(1) + t * rho)) / rho;
    Vector<T> projection{};
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Vector<T> direction = vectors(offset)[v] * inverse_distance;
      const Vector<T> w = vectors(relative)[v] * share;
      const Vector<T> e = direction * direction;
      const Vector<T> inverse = T(1) / (T(1) + (T(2) * t) * w);
      const Vector<T> by_e = (t * actual) * inverse;
      const Vector<T> by_w = by_e * (T(1) - (T(2) * t) * e * inverse);
      vectors(e_slope)[v] += by_e;
      vectors(w_slope)[v] += by_w;
      projection += e * by_e + w * by_w;
    }
    correction.projection += sum_lanes<T>(projection);
  }
  return correction;
}

template <typename T>
CALM_INLINE T closed_form_term(const EnergyPosition<T>& position,
                               const PowerConstants<T>& constants) {
  const int64_t num_vectors = position.padded / Lanes<T>::kCount;
  const T weight = T(-2) / static_cast<T>(position.num_samples);
  T* const offset = position.scratch;
  T* const relative = position.scratch + position.padded;
  T* const e_slope = position.scratch + 2 * position.padded;
  T* const w_slope = position.scratch + 3 * position.padded;

  SpreadSums<T> spread{};
  {
    Vector<T> trace{};
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Vector<T> s = vectors(position.std)[v];
      vectors(relative)[v] = s * s;
      trace += s * s;
    }
    spread.trace = sum_lanes<T>(trace);
    // Divided and not multiplied by an inverse, which overflows where the trace is denormal.
    const T trace_or_one = spread.trace == T(0) ? T(1) : spread.trace;
    Vector<T> second{}, third{}, fourth{};
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Vector<T> r = vectors(relative)[v] / trace_or_one;
      const Vector<T> r2 = r * r;
      vectors(relative)[v] = r;
      second += r2;
      third += r2 * r;
      fourth += r2 * r2;
    }
    spread.second = sum_lanes<T>(second);
    spread.third = sum_lanes<T>(third);
    spread.fourth = sum_lanes<T>(fourth);
  }

  const bool any_grad = position.grad_samples != nullptr || position.grad_mean != nullptr ||
                        position.grad_log_std != nullptr;
  T total = 0;
  for (int64_t n = 0; n < position.num_samples; ++n) {
    const Vector<T>* x = vectors(position.samples + n * position.padded);
    Vector<T> squares{};
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Vector<T> difference = x[v] - vectors(position.mean)[v];
      vectors(offset)[v] = difference;
      squares += difference * difference;
    }
    const T mu = sum_lanes<T>(squares) + spread.trace;
    const T safe_mu = mu == T(0) ? T(1) : mu;
    // Two factors 1 / sqrt(mu): mu^(a-1) alone overflows where the distance is tiny.
    const T inverse_distance = T(1) / square_root(safe_mu);
    const T share = spread.trace / safe_mu;
    Vector<T> mixed1{}, mixed2{}, mixed3{};
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Vector<T> direction = vectors(offset)[v] * inverse_distance;
      const Vector<T> w = vectors(relative)[v] * share;
      const Vector<T> ew = direction * direction * w;
      mixed1 += ew;
      mixed2 += ew * w;
      mixed3 += ew * w * w;
    }
    const T share2 = share * share;
    const LawMoments<T> law{
        T(2) * share2 * spread.second + T(4) * sum_lanes<T>(mixed1),
        T(8) * share2 * share * spread.third + T(24) * sum_lanes<T>(mixed2),
        T(48) * share2 * share2 * spread.fourth + T(192) * sum_lanes<T>(mixed3)};
    MomentFactor<T> factor = moment_factor(law, constants);
    T projection = 0;
    if (factor.nodes != 0) {
      const NodeCorrection<T> correction = node_correction(
          position, offset, relative, inverse_distance, share, law.rho,
          factor.nodes == 8 ? constants.eight : constants.sixteen, e_slope, w_slope);
      factor.value += correction.value;
      factor.rho += correction.rho;
      projection = correction.projection;
    }
    const T distance_power = power_of_square(mu, constants.a);
    total += distance_power * factor.value;
    if (!any_grad) continue;

    const T homogeneous = constants.a * factor.value - T(2) * law.rho * factor.rho -
                          T(3) * law.third * factor.third - T(4) * law.fourth * factor.fourth -
                          projection;
    const T scale = weight * T(2) * distance_power;
    const T c0 = scale * homogeneous;
    const T c1 = T(4) * scale * factor.rho;
    const T c2 = T(24) * scale * factor.third;
    const T c3 = T(192) * scale * factor.fourth;
    for (int64_t v = 0; v < num_vectors; ++v) {
      const Vector<T> direction = vectors(offset)[v] * inverse_distance;
      const Vector<T> w = vectors(relative)[v] * share;
      Vector<T> slope = ((c3 * w + c2) * w + c1) * w + c0;
      if (position.grad_log_std != nullptr) {
        const Vector<T> e = direction * direction;
        Vector<T> by_variance = ((T(3) * c3 * w + T(2) * c2) * w + c1) * e + slope;
        if (factor.nodes != 0) by_variance += scale * vectors(w_slope)[v];
        vectors(position.grad_log_std)[v] += by_variance * w;
      }
      if (factor.nodes != 0) slope += scale * vectors(e_slope)[v];
      const Vector<T> gradient = slope * direction * inverse_distance;
      if (position.grad_samples != nullptr) {
        vectors(position.grad_samples + n * position.padded)[v] += gradient;
      }
      if (position.grad_mean != nullptr) vectors(position.grad_mean)[v] -= gradient;
    }
  }
  return total * weight;
}

// Powers and weighted slopes of a block of squared distances. The common alpha = 1 is free of
// branches and stays in lanes; the rest calls pow.
template <typename T, int64_t kBlock>
CALM_INLINE T powers_and_slopes(const T (&squares)[kBlock], int64_t count, T weight,
                                const PowerConstants<T>& constants, T (&slopes)[kBlock]) {
  T powers[kBlock];
  if (constants.a == T(0.5)) {
    for (int64_t n = 0; n < kBlock; ++n) {
      const T square = squares[n];
      const T not_finite = square - square;
      const T root = std::sqrt(square);
      const T slope = std::min(constants.alpha / root, std::numeric_limits<T>::max());
      powers[n] = root + not_finite;
      slopes[n] = square == T(0) ? T(0) : weight * slope + not_finite;
    }
  } else {
    for (int64_t n = 0; n < count; ++n) {
      powers[n] = power_of_square(squares[n], constants.a);
      slopes[n] = weight * slope_of_power(squares[n], constants);
    }
  }
  T total = 0;
  for (int64_t n = 0; n < count; ++n) total += powers[n];
  return total;
}

template <typename T>
CALM_INLINE T target_term(const EnergyPosition<T>& position, const PowerConstants<T>& constants,
                          const T* targets, int64_t num_targets, T weight, T* grad_targets) {
  // Samples worked on together: their distance sums live in registers while a target streams by.
  constexpr int64_t kBlock = 8;
  const int64_t num_vectors = position.padded / Lanes<T>::kCount;
  const bool any_grad = position.grad_samples != nullptr || grad_targets != nullptr;
  T total = 0;
  for (int64_t m = 0; m < num_targets; ++m) {
    const Vector<T>* y = vectors(targets + m * position.padded);
    for (int64_t first = 0; first < position.num_samples; first += kBlock) {
      const int64_t left = position.num_samples - first;
      const int64_t count = left < kBlock ? left : kBlock;
      const T* x = position.samples + first * position.padded;
      T squares[kBlock] = {};
      T slopes[kBlock];
      if (count == kBlock) {
        Vector<T> sums[kBlock] = {};
        for (int64_t v = 0; v < num_vectors; ++v) {
#pragma GCC unroll 8
          for (int64_t n = 0; n < kBlock; ++n) {
            const Vector<T> difference = vectors(x + n * position.padded)[v] - y[v];
            sums[n] += difference * difference;
          }
        }
        for (int64_t n = 0; n < kBlock; ++n) squares[n] = sum_lanes<T>(sums[n]);
      } else {
        for (int64_t n = 0; n < count; ++n) {
          squares[n] =
              squared_distance(x + n * position.padded, targets + m * position.padded, num_vectors);
        }
      }
      total += powers_and_slopes(squares, count, weight, constants, slopes);
      if (!any_grad) continue;
      if (count == kBlock && grad_targets == nullptr) {
        // The usual case, in straight-line code.
        for (int64_t v = 0; v < num_vectors; ++v) {
          const Vector<T> target = y[v];
#pragma GCC unroll 8
          for (int64_t n = 0; n < kBlock; ++n) {
            vectors(position.grad_samples + (first + n) * position.padded)[v] +=
                slopes[n] * (vectors(x + n * position.padded)[v] - target);
          }
        }
        continue;
      }
      for (int64_t v = 0; v < num_vectors; ++v) {
        Vector<T> target_sum{};
        for (int64_t n = 0; n < count; ++n) {
          const Vector<T> pull = slopes[n] * (vectors(x + n * position.padded)[v] - y[v]);
          if (position.grad_samples != nullptr) {
            vectors(position.grad_samples + (first + n) * position.padded)[v] += pull;
          }
          target_sum += pull;
        }
        if (grad_targets != nullptr) {
          vectors(grad_targets + m * position.padded)[v] -= target_sum;
        }
      }
    }
  }
  return total * weight;
}

}  // namespace

CALM_MULTIVERSION
float add_pair_term(const EnergyPosition<float>& position, const PowerConstants<float>& constants) {
  return pair_term(position, constants);
}

CALM_MULTIVERSION
double add_pair_term(const EnergyPosition<double>& position,
                     const PowerConstants<double>& constants) {
  return pair_term(position, constants);
}

CALM_MULTIVERSION
float add_closed_form_term(const EnergyPosition<float>& position,
                           const PowerConstants<float>& constants) {
  return closed_form_term(position, constants);
}

CALM_MULTIVERSION
double add_closed_form_term(const EnergyPosition<double>& position,
                            const PowerConstants<double>& constants) {
  return closed_form_term(position, constants);
}

CALM_MULTIVERSION
float add_target_term(const EnergyPosition<float>& position, const PowerConstants<float>& constants,
                      const float* targets, int64_t num_targets, float weight,
                      float* grad_targets) {
  return target_term(position, constants, targets, num_targets, weight, grad_targets);
}

CALM_MULTIVERSION
double add_target_term(const EnergyPosition<double>& position,
                       const PowerConstants<double>& constants, const double* targets,
                       int64_t num_targets, double weight, double* grad_targets) {
  return target_term(position, constants, targets, num_targets, weight, grad_targets);
}

CALM_MULTIVERSION
void energy_normals(uint64_t seed, uint64_t row, int64_t group, int64_t count, float* out) {
  for (int64_t g = 0; g < count; ++g) {
    normals_of_blocks(seed, row, static_cast<uint32_t>((group + g) * kPhiloxLanes),
                      Stream::kEnergyTargets, out + g * 4 * kPhiloxLanes);
  }
}

void energy_normals(uint64_t seed, uint64_t row, int64_t group, int64_t count, double* out) {
  for (int64_t b = 0; b < count * kPhiloxLanes; ++b) {
    const PhiloxWords words =
        philox(seed, row, static_cast<uint32_t>(group * kPhiloxLanes + b), Stream::kEnergyTargets);
    for (int pair = 0; pair < 4; pair += 2) {
      const double u0 = to_uniform(words.word[pair]);
      const double u1 = to_uniform(words.word[pair + 1]);
      const double radius = std::sqrt(-2.0 * std::log(u0));
      out[4 * b + pair] = radius * std::cos(6.283185307179586476925 * u1);
      out[4 * b + pair + 1] = radius * std::sin(6.283185307179586476925 * u1);
    }
  }
}

}  // namespace calm
