// The energy score with the closed form of its target term, and its gradients: the fast kernel,
// N <= 8 samples, rows of at most 512 bytes. Free of torch.
//
// Fewest bytes: samples [N,P,D], mean and log_std [P,D] read once, score and the wanted gradients
// written once: 37.8 MB at P=8188, N=8, D=128 in bf16 with the gradient in samples. Operations an
// element and position, N=8: 56 for the pair distances, 48 for the moments, 96 for the gradient,
// about 25 to unpack and pack; all else is per position. The bytes take 9 us at 4.3 TB/s, the
// operations about as long, so both have to overlap and nothing else may cost.
//
// Mapping: a warp takes four positions and shares nothing with other warps.
//   1. In rounds, `width` lanes a position: a lane with 16 bytes of every row, held in registers as
//      they came, adds its elements to the sums of all pairs and samples, which are then summed
//      over lanes together (energy_score_reduce.cuh). 16 lanes at D=128 in bf16: two rounds.
//   2. All four positions at once, 8 lanes each: powers, Gamma ratios and slopes, one lane a pair
//      or a sample. A position of its own per round would leave most lanes idle here.
//   3. In rounds again: gradients, four elements a lane at a time. Samples are read once more, from
//      cache: kept in registers they would halve the number of warps.
// bf16, N=8, on sm_90: 128 registers, no spills, 1350 instructions of a warp a position at D=128,
// of which 800 are the operations above.
//
// The gradient of sample n is one row of a matrix-vector product in the offsets delta_k = x_k -
// mean, which the closed form needs anyway:
//   (sum_k c_nk + p_n(r)) delta_n - sum_{k != n} c_nk delta_k,
// p_n the slope polynomial, c_nk = weight * alpha |x_n - x_k|^(alpha - 2). Differences of offsets
// lose digits where two samples are far closer to each other than to the mean; such a position, one
// that needs quadrature nodes and one of extreme scale take the path of energy_score_nodes.cuh,
// which forms every difference directly. Distances are always sums of direct differences.
#pragma once

#include "cuda/energy_score_nodes.cuh"

namespace calm {

constexpr int kClosedFormWarps = 2;
// 16 warps on a multiprocessor: at P=8188 every position is on its way at once.
constexpr int kClosedFormBlocks = 8;

// Least squared distance of two samples, in squared offsets, for which the differences of offsets
// serve: they then lose 6 bits in float, and less than a gradient of 16 bits is rounded by.
template <typename In>
constexpr float kLeastSeparation = sizeof(In) == 4 ? 0x1p-12f : 0x1p-22f;
// Scale beyond which slopes are not folded into one factor.
constexpr float kLeastMu = 1e-30f;
constexpr float kLargestSlope = 1e30f;

// The pairs' sums; behind them, in a quad of their own, three of the spread.
template <int kSamples>
constexpr int kSpreadColumn = (num_pairs(kSamples) + 3) / 4 * 4;
template <int kSamples>
constexpr int kPairColumns = padded_columns(kSpreadColumn<kSamples> + 4);
template <int kSamples>
constexpr int kMomentColumns = padded_columns(4 * kSamples);

// A lane's elements of all samples, packed as they came.
template <typename In, int kSamples, int kElements>
struct SamplePieces {
  Piece<In, kElements> x[kSamples];

  __device__ void load(const EnergyArguments<In>& arguments, int64_t p, int first_element,
                       bool exists) {
    const In* row = arguments.samples.row(0, p) + first_element;
    CALM_UNROLL
    for (int n = 0; n < kSamples; ++n) {
      x[n] = load_piece<In, kElements>(row, exists);
      row += arguments.samples.row_stride;
    }
  }
};

// Writes the law of the lane's elements, and its part of the sums of the spread, to shared memory.
// Returns the trace.
template <typename In, int kSamples>
__device__ inline float write_law(const EnergyArguments<In>& arguments,
                                  const WarpPositions<In>& warp, int round) {
  constexpr int kElements = kLaneElements<In>;
  const int64_t p = warp.numbers(warp.slot(round)).position;
  const auto mean = warp.load(arguments.mean, 0, p);
  const auto log_std = warp.load(arguments.log_std, 0, p);
  float variance[kElements];
  float trace = 0.0f;
  CALM_UNROLL
  for (int i = 0; i < kElements; ++i) {
    variance[i] = warp.owns() ? variance_of(log_std[i]) : 0.0f;
    trace += variance[i];
  }
  trace = group_sum(trace, warp.group.width);
  const float scale = inverse_trace(trace);
  Float4* const law = warp.law(round) + kChunks<In> * warp.group.lane;
  Float4 sums{};
  CALM_UNROLL
  for (int c = 0; c < kChunks<In>; ++c) {
    Float4 relative;
    Float4 means;
    CALM_UNROLL
    for (int i = 0; i < kChunkElements; ++i) {
      const float r = variance[c * kChunkElements + i] * scale;
      sums.value[0] += r * r;
      sums.value[1] += r * r * r;
      sums.value[2] += (r * r) * (r * r);
      relative.value[i] = r;
      means.value[i] = mean[c * kChunkElements + i];
    }
    law[c] = relative;
    law[warp.kMeans + c] = means;
  }
  warp.staging[(threadIdx.x & 31u) * staging_stride(kPairColumns<kSamples>) +
               kSpreadColumn<kSamples> / 4] = sums;
  return trace;
}

// Adds the lane's elements to the squared distances of the pairs, and to sum delta^2 r^j of sample
// n in moments[4 n + j].
template <typename In, int kSamples>
__device__ inline void add_elements(const SamplePieces<In, kSamples, kLaneElements<In>>& pieces,
                                    const Float4* law, float (&pairs)[kSpreadColumn<kSamples>],
                                    float (&moments)[kMomentColumns<kSamples>]) {
  CALM_UNROLL
  for (int i = 0; i < kLaneElements<In>; ++i) {
    const int c = i / kChunkElements;
    const float mean = law[WarpPositions<In>::kMeans + c].value[i % kChunkElements];
    const float r = law[c].value[i % kChunkElements];
    const float r2 = r * r;
    const float r3 = r2 * r;
    CALM_UNROLL
    for (int k = 0; k < kSamples; ++k) {
      CALM_UNROLL
      for (int n = 0; n < k; ++n) {
        const float difference = pieces.x[n][i] - pieces.x[k][i];
        pairs[pair_index(n, k)] += difference * difference;
      }
      const float offset = pieces.x[k][i] - mean;
      const float square = offset * offset;
      moments[4 * k] += square;
      moments[4 * k + 1] += square * r;
      moments[4 * k + 2] += square * r2;
      moments[4 * k + 3] += square * r3;
    }
  }
}

// Gradients in mean and log_std of a chunk.
template <typename In, int kSamples>
__device__ inline void law_gradients(const SamplePieces<In, kSamples, kChunkElements>& pieces,
                                     const Float4* law, const PositionNumbers& own,
                                     float (&grad_mean)[kChunkElements],
                                     float (&grad_log_std)[kChunkElements]) {
  CALM_UNROLL
  for (int i = 0; i < kChunkElements; ++i) {
    const float mean = law[WarpPositions<In>::kMeans].value[i];
    const float r = law[0].value[i];
    const float variance = own.spread.trace * r;
    grad_mean[i] = 0.0f;
    grad_log_std[i] = 0.0f;
    CALM_UNROLL
    for (int n = 0; n < kSamples; ++n) {
      const Float4 polynomial = own.polynomials[n];
      const float offset = pieces.x[n][i] - mean;
      const float slope = slope_in_e(polynomial.value, r);
      grad_mean[i] -= slope * offset;
      grad_log_std[i] +=
          variance * slope + r * (offset * offset * slope_in_w_over_e(polynomial.value, r));
    }
  }
}

// Puts the gradients in the samples in their place.
template <typename In, int kSamples>
__device__ inline void replace_by_gradients(SamplePieces<In, kSamples, kChunkElements>& pieces,
                                            const Float4* law, const PositionNumbers& own) {
  using Elements = Piece<In, kChunkElements>;
  constexpr int kPairs = num_pairs(kSamples);
  float slope[kPairs];
  CALM_UNROLL
  for (int quad = 0; quad < (kPairs + 3) / 4; ++quad) {
    const Float4 four = own.pairs[quad];
    CALM_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (4 * quad + i < kPairs) slope[4 * quad + i] = four.value[i];
    }
  }
  const Float4 relative = law[0];
  const Float4 means = law[WarpPositions<In>::kMeans];
  CALM_UNROLL
  for (int w = 0; w < Elements::kWords; ++w) {
    float offset[kSamples][Elements::kPerWord];
    CALM_UNROLL
    for (int n = 0; n < kSamples; ++n) {
      CALM_UNROLL
      for (int j = 0; j < Elements::kPerWord; ++j) {
        const int i = w * Elements::kPerWord + j;
        offset[n][j] = pieces.x[n][i] - means.value[i];
      }
    }
    CALM_UNROLL
    for (int n = 0; n < kSamples; ++n) {
      const Float4 diagonal = own.diagonals[n];
      float gradient[Elements::kPerWord];
      CALM_UNROLL
      for (int j = 0; j < Elements::kPerWord; ++j) {
        const float r = relative.value[w * Elements::kPerWord + j];
        gradient[j] = slope_in_e(diagonal.value, r) * offset[n][j];
        CALM_UNROLL
        for (int k = 0; k < kSamples; ++k) {
          if (k != n) gradient[j] -= slope[pair_of(n, k)] * offset[k][j];
        }
      }
      pieces.x[n].set_word(w, gradient);
    }
  }
}

// The numbers of all positions of a warp, kLanesPerPosition lanes each, one lane a sample and one a
// pair. Returns the lanes whose position has to take the other path.
template <typename In, int kSamples>
__device__ inline unsigned position_numbers(const EnergyArguments<In>& arguments,
                                            const WarpPositions<In>& warp) {
  const int lane = static_cast<int>(threadIdx.x % kLanesPerPosition);
  const int slot = static_cast<int>(threadIdx.x % 32 / kLanesPerPosition);
  PositionNumbers& own = warp.numbers(slot);
  const PowerConstants<float>& constants = arguments.constants;
  float* const pairs = own.pairs->value;
  const SpreadSums<float> spread{own.spread.trace, pairs[kSpreadColumn<kSamples>],
                                 pairs[kSpreadColumn<kSamples> + 1],
                                 pairs[kSpreadColumn<kSamples> + 2]};

  // Lanes without a sample repeat the first.
  const bool has_sample = lane < kSamples;
  const Float4 moments = own.moments[has_sample ? lane : 0];
  const SampleLaw<float> law = sample_law(moments.value, spread, constants.a);
  const MomentFactor<float> factor = moment_factor(law.moments, constants);
  bool direct = factor.nodes != 0 || (law.mu > 0.0f && law.mu < kLeastMu);
  const float least_square =
      kLeastSeparation<In> * group_max(has_sample ? moments.value[0] : 0.0f, kLanesPerPosition);

  float pair_score = 0.0f;
  for (int q = lane; q < num_pairs(kSamples); q += kLanesPerPosition) {
    const float square = pairs[q];
    const PowerAndSlope<float> pair = power_and_slope(square, constants);
    const float slope = arguments.pair_weight * pair.slope;
    pair_score += arguments.pair_weight * pair.power;
    pairs[q] = slope;
    direct = direct || (square > 0.0f && (square < least_square || slope > kLargestSlope));
  }
  pair_score = group_sum(pair_score, kLanesPerPosition);
  const float term = has_sample ? arguments.target_weight * law.power * factor.value : 0.0f;
  const float score = pair_score + group_sum(term, kLanesPerPosition);
  const unsigned direct_lanes = __ballot_sync(kAllLanes, direct);
  __syncwarp();
  const bool taken = warp.contains(direct_lanes, slot);
  if (lane == 0) {
    own.spread = spread;
    own.pair_score = pair_score;
    // A position's results never depend on its neighbours: each takes its own path.
    if (own.exists != 0 && !taken) arguments.score[own.position] = score;
  }

  // Slopes as cubics in r, the divisor of delta / mu folded in.
  if (has_sample) {
    const SlopePolynomial<float> slopes =
        slope_polynomial(law, factor, 0.0f, arguments.target_weight, constants.a);
    Float4 polynomial;
    float fold = law.inverse_distance;
    CALM_UNROLL
    for (int j = 0; j < 4; ++j) {
      polynomial.value[j] = slopes.c[j] * fold * law.inverse_distance;
      fold *= law.share;
    }
    own.polynomials[lane] = polynomial;
    // Pairs (k, n) with k < n lie side by side, those with k > n at a distance that depends on k.
    const int n = lane;
    const float* const before = pairs + pair_index(0, n);
    const float* const after = pairs + n;
    CALM_UNROLL
    for (int k = 0; k < kSamples; ++k) {
      if (k < n) polynomial.value[0] += before[k];
      if (k > n) polynomial.value[0] += after[pair_index(0, k)];
    }
    own.diagonals[lane] = polynomial;
  }
  __syncwarp();
  return direct_lanes;
}

// Gradients of the positions of a round, a chunk at a time; samples come from cache.
template <typename In, int kSamples>
__device__ inline void store_gradients(const EnergyArguments<In>& arguments,
                                       const WarpPositions<In>& warp, int round,
                                       unsigned direct_lanes) {
  using Elements = Piece<In, kChunkElements>;
  const int slot = warp.slot(round);
  const PositionNumbers& own = warp.numbers(slot);
  const bool stores = own.exists != 0 && !warp.contains(direct_lanes, slot);
  const int64_t p = own.position;
  for (int c = 0; c < kChunks<In>; ++c) {
    const bool owns = warp.first_element(c) < warp.size;
    const int first_element = owns ? warp.first_element(c) : 0;
    const Float4* const law = warp.law(round) + first_element / kChunkElements;
    const int64_t start = arguments.dense(0, p) + first_element;
    SamplePieces<In, kSamples, kChunkElements> pieces;
    pieces.load(arguments, p, first_element, true);
    if (arguments.grad_mean != nullptr || arguments.grad_log_std != nullptr) {
      float grad_mean[kChunkElements];
      float grad_log_std[kChunkElements];
      law_gradients(pieces, law, own, grad_mean, grad_log_std);
      Elements out;
      if (stores && owns && arguments.grad_mean != nullptr) {
        out.set(grad_mean);
        store_piece<In, kChunkElements>(arguments.grad_mean + start, out);
      }
      if (stores && owns && arguments.grad_log_std != nullptr) {
        out.set(grad_log_std);
        store_piece<In, kChunkElements>(arguments.grad_log_std + start, out);
      }
    }
    if (arguments.grad_samples != nullptr) {
      replace_by_gradients(pieces, law, own);
      if (stores && owns) {
        In* row = arguments.grad_samples + start;
        const int64_t row_stride = arguments.shape.num_positions * arguments.shape.size;
        CALM_UNROLL
        for (int n = 0; n < kSamples; ++n) {
          store_piece<In, kChunkElements>(row, pieces.x[n]);
          row += row_stride;
        }
      }
    }
  }
}

template <typename In, int kSamples>
__global__ void __launch_bounds__(kClosedFormWarps * 32, kClosedFormBlocks)
    closed_form_kernel(const __grid_constant__ EnergyArguments<In> arguments,
                       const int log2_width) {
  CALM_DYNAMIC_SHARED_ARRAY(Float4, shared);
  const WarpPositions<In> warp(arguments, log2_width,
                               shared + threadIdx.x / 32 * closed_form_quads<In>(1 << log2_width));
  warp.begin(arguments.shape.num_positions);
  for (int round = 0; round < warp.rounds(); ++round) {
    PositionNumbers& own = warp.numbers(warp.slot(round));
    SamplePieces<In, kSamples, kLaneElements<In>> pieces;
    pieces.load(arguments, own.position, warp.first_element(), warp.owns());
    const float trace = write_law<In, kSamples>(arguments, warp, round);
    if (warp.group.lane == 0) own.spread.trace = trace;
    float pairs[kSpreadColumn<kSamples>] = {};
    float moments[kMomentColumns<kSamples>] = {};
    add_elements(pieces, warp.law(round) + kChunks<In> * warp.group.lane, pairs, moments);
    stage_columns<kPairColumns<kSamples>>(pairs, warp.staging);
    sum_staged_columns<kPairColumns<kSamples>>(warp.staging, own.pairs, warp.group);
    sum_columns(moments, warp.staging, own.moments, warp.group);
  }
  const unsigned direct_lanes = position_numbers<In, kSamples>(arguments, warp);
  if (arguments.grad_samples != nullptr || arguments.grad_mean != nullptr ||
      arguments.grad_log_std != nullptr) {
    for (int round = 0; round < warp.rounds(); ++round) {
      store_gradients<In, kSamples>(arguments, warp, round, direct_lanes);
    }
  }
  if (direct_lanes != 0) {
    closed_form_directly(arguments, log2_width, warp.staging, direct_lanes);
  }
}

}  // namespace calm
