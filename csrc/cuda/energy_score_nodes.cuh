// The other path of the closed form's kernel (energy_score_closed_form.cuh): score and gradients of
// a position that needs quadrature nodes, whose samples nearly coincide, or of extreme scale.
//
// Operations: a node costs 9 an element and sample for its two sums, one logarithm for 4 elements,
// and 6 more for the gradient; with 8 nodes that is some 7 times the rest of the work. Bytes: none
// beyond the fast path's, rows come from cache.
//
// Mapping: that of the rounds of the fast path, with samples one after the other, so that no array
// of registers depends on their number, and one lane a node where a node is a few numbers. All
// lanes of a warp come along; positions that are not meant store nothing. Not inlined: its
// registers are no burden of the fast path.
#pragma once

#include "cuda/energy_score_positions.cuh"

namespace calm {

static_assert(2 * kMaxNodes == kMaxColumns, "a node has two columns");

// Writes the lane's partial sums for all nodes: log_actual in columns 0..15, projection in 16..31.
template <int kElements>
__device__ inline void stage_node_sums(const float (&e)[kElements], const float (&w)[kElements],
                                       const float* nodes, int count, Float4* row) {
  for (int first = 0; first < kMaxNodes; first += kNodeBatch) {
    Float4 log_actual{};
    Float4 projection{};
    if (first < count) {
      CALM_UNROLL
      for (int j = 0; j < kNodeBatch; ++j) {
        const float t = nodes[first + j];
        float logs = 0.0f;
        float excess = 0.0f;  // of the product over 1: small factors keep their digits
        float damped = 0.0f;
        float projected = 0.0f;
        CALM_UNROLL
        for (int i = 0; i < kElements; ++i) {
          const float scaled = 2.0f * t * w[i];
          const float inverse = quotient(1.0f, 1.0f + scaled);
          const float e_inverse = e[i] * inverse;
          damped += e_inverse;
          projected += e_inverse + w[i] * inverse * (1.0f - 2.0f * t * e_inverse);
          excess += scaled * (1.0f + excess);
          if (i % kFactorsPerLog == kFactorsPerLog - 1 || i == kElements - 1) {
            logs += log1pf(excess);
            excess = 0.0f;
          }
        }
        log_actual.value[j] = -0.5f * logs - t * damped;
        projection.value[j] = projected;
      }
    }
    row[first / 4] = log_actual;
    row[(kMaxNodes + first) / 4] = projection;
  }
}

// Computes and stores what the group's position of a round has, score included, if it is among
// `taken_lanes`.
template <typename In>
__device__ inline void round_directly(const EnergyArguments<In>& arguments,
                                      const WarpPositions<In>& warp, int round,
                                      unsigned taken_lanes) {
  constexpr int kElements = kLaneElements<In>;
  const PowerConstants<float>& constants = arguments.constants;
  const LaneGroup& group = warp.group;
  const int slot = warp.slot(round);
  PositionNumbers& own = warp.numbers(slot);
  const int64_t p = own.position;
  const int num_samples = static_cast<int>(arguments.shape.num_samples);
  const bool live = own.exists != 0 && warp.contains(taken_lanes, slot);
  const float weight = arguments.target_weight;
  Float4* const staging = warp.staging;
  Float4* const row = staging + (threadIdx.x & 31u) * staging_stride(kMaxColumns);
  float* const strengths = own.polynomials->value;
  const float* const pairs = own.pairs->value;
  const SpreadSums<float> spread = own.spread;

  const Float4* const law = warp.law(round) + kChunks<In> * group.lane;
  float relative[kElements];
  float mean[kElements];
  float grad_mean[kElements];
  float grad_log_std[kElements];
  CALM_UNROLL
  for (int i = 0; i < kElements; ++i) {
    relative[i] = law[i / kChunkElements].value[i % kChunkElements];
    mean[i] = law[warp.kMeans + i / kChunkElements].value[i % kChunkElements];
    grad_mean[i] = 0.0f;
    grad_log_std[i] = 0.0f;
  }

  // Lanes past the last position run along with it and store nothing.
  float score = own.pair_score;
  for (int n = 0; n < num_samples; ++n) {
    const auto x = warp.load(arguments.samples, n, p);
    const SampleLaw<float> sample = sample_law(own.moments[n].value, spread, constants.a);
    MomentFactor<float> factor = moment_factor(sample.moments, constants);
    float direction[kElements];
    float e[kElements];
    float w[kElements];
    CALM_UNROLL
    for (int i = 0; i < kElements; ++i) {
      direction[i] = (x[i] - mean[i]) * sample.inverse_distance;
      e[i] = direction[i] * direction[i];
      w[i] = relative[i] * sample.share;
    }

    // Groups of a warp walk the nodes together; one without its own runs along and drops them.
    int count = __any_sync(kAllLanes, factor.nodes != 0) ? 8 : 0;
    if (__any_sync(kAllLanes, factor.nodes > 8)) count = kMaxNodes;
    const bool eight = factor.nodes == 8;
    const float* const nodes = eight ? constants.eight.t : constants.sixteen.t;
    const float* const node_weights = eight ? constants.eight.weight : constants.sixteen.weight;
    float projection = 0.0f;
    if (count != 0) {
      stage_node_sums(e, w, nodes, eight ? 8 : count, row);
      sum_staged_columns<kMaxColumns>(staging, own.polynomials, group);
      NodeCorrection<float> sum{};
      for (int j = group.lane; j < kMaxNodes; j += group.width) {
        float strength = 0.0f;
        if (j < factor.nodes) {
          const NodeTerm<float> node = node_term(nodes[j], node_weights[j], sample.moments.rho,
                                                 strengths[j], strengths[kMaxNodes + j]);
          sum.value += node.correction.value;
          sum.rho += node.correction.rho;
          sum.projection += node.correction.projection;
          strength = node.strength;
        }
        strengths[j] = strength;
      }
      __syncwarp();
      factor.value += group_sum(sum.value, group.width);
      factor.rho += group_sum(sum.rho, group.width);
      projection = group_sum(sum.projection, group.width);
    }
    score += weight * sample.power * factor.value;

    const SlopePolynomial<float> slopes =
        slope_polynomial(sample, factor, projection, weight, constants.a);
    float slope[kElements];
    float by_w[kElements];
    CALM_UNROLL
    for (int i = 0; i < kElements; ++i) {
      slope[i] = slope_in_e(slopes.c, w[i]);
      by_w[i] = slope[i] + slope_in_w_over_e(slopes.c, w[i]) * e[i];
    }
    for (int j = 0; j < count; ++j) {
      if (j >= factor.nodes) break;
      const float t2 = 2.0f * nodes[j];
      const float strength = slopes.scale * strengths[j];
      CALM_UNROLL
      for (int i = 0; i < kElements; ++i) {
        const float node_inverse = quotient(1.0f, 1.0f + t2 * w[i]);
        const float by_e = strength * node_inverse;
        slope[i] += by_e;
        by_w[i] += by_e * (1.0f - t2 * e[i] * node_inverse);
      }
    }
    float gradient[kElements];
    CALM_UNROLL
    for (int i = 0; i < kElements; ++i) {
      gradient[i] = slope[i] * direction[i] * sample.inverse_distance;
      grad_mean[i] -= gradient[i];
      grad_log_std[i] += by_w[i] * w[i];
    }
    if (arguments.grad_samples != nullptr) {
      for (int k = 0; k < num_samples; ++k) {
        if (k == n) continue;
        const auto other = warp.load(arguments.samples, k, p);
        const float pull = pairs[pair_of(n, k)];
        CALM_UNROLL
        for (int i = 0; i < kElements; ++i) gradient[i] += pull * (x[i] - other[i]);
      }
      if (live) warp.store(arguments.grad_samples + arguments.dense(n, p), gradient);
    }
  }

  if (!live) return;
  if (group.lane == 0) arguments.score[p] = score;
  if (arguments.grad_mean != nullptr) {
    warp.store(arguments.grad_mean + arguments.dense(0, p), grad_mean);
  }
  if (arguments.grad_log_std != nullptr) {
    warp.store(arguments.grad_log_std + arguments.dense(0, p), grad_log_std);
  }
}

// The same for the positions of `taken_lanes` among a warp's.
template <typename In>
[[gnu::noinline]] __device__ void closed_form_directly(const EnergyArguments<In>& arguments,
                                                       int log2_width, Float4* shared,
                                                       unsigned taken_lanes) {
  const WarpPositions<In> warp(arguments, log2_width, shared);
  for (int round = 0; round < warp.rounds(); ++round) {
    round_directly(arguments, warp, round, taken_lanes);
  }
}

}  // namespace calm
