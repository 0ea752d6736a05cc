// The energy score in its generality: any N, D, M, strides and dtype, float64 included; one block a
// position. Free of torch. What the fast kernels (energy_score_closed_form.cuh,
// energy_score_targets.cuh) serve goes there.
//
// Fewest bytes: as theirs; rows are read again from cache where they are needed again. Shared
// memory holds a row of D, or the targets of a batch, and a few numbers a pair and sample: 64
// samples of 4096 dimensions fit, in float64 too. Operations an element: N (N-1) for the pair
// distances, 6 N for the moments of the closed form, 2 N^2 + 10 N for the gradient; with targets 4
// N M and M normals.
//
// Mapping: `width` lanes, 32 unless D is smaller, sum over the elements for a tile of 4 x 4 rows
// together: 8 loads for 32 operations. Powers are taken a thread a pair. Gradients are a thread an
// element and tile of 4 samples, over all pairs and the targets of the batch. With several batches,
// partial gradients wait in the result itself or, where its dtype is too narrow, in a workspace;
// the thread that wrote one is the thread that reads it.
#pragma once

#include "common/normal.h"
#include "cuda/energy_score_block_shared.cuh"

namespace calm {

template <typename In>
struct BlockPosition {
  using T = Compute<In>;
  using Record = SampleRecord<T>;

  const EnergyArguments<In>& arguments;
  const BlockLayout& layout;
  const LaneGroup group;
  T* const shared;
  const int num_samples;
  const int size;
  const int row;  // of slopes
  int64_t p;

  __device__ BlockPosition(const EnergyArguments<In>& arguments_, const BlockLayout& layout_,
                           int log2_width, T* shared_)
      : arguments(arguments_),
        layout(layout_),
        group(log2_width),
        shared(shared_),
        num_samples(static_cast<int>(arguments_.shape.num_samples)),
        size(static_cast<int>(arguments_.shape.size)),
        row(static_cast<int>(layout_.row)),
        p(0) {}

  __device__ T* slopes() const { return shared + layout.slopes; }
  __device__ T* relative() const { return shared + layout.relative; }
  __device__ Record& record(int n) const {
    return reinterpret_cast<Record*>(shared + layout.records)[n];
  }
  __device__ T* targets() const { return shared + layout.targets; }
  __device__ T* target_slopes() const { return shared + layout.target_slopes; }
  __device__ bool drawn() const { return arguments.seed != nullptr; }

  __device__ T sample(int n, int d) const { return arguments.samples.at(n, p, d); }
  __device__ T mean(int d) const { return arguments.mean.at(0, p, d); }
  __device__ T std(int d) const { return exponential(arguments.log_std.at(0, p, d)); }
  // What targets are subtracted from: drawn ones have no mean.
  __device__ T centred_sample(int n, int d) const {
    return drawn() ? sample(n, d) - mean(d) : sample(n, d);
  }
  __device__ int clamp_sample(int n) const { return n < num_samples ? n : num_samples - 1; }

  // Groups of the block, and this lane's.
  __device__ int num_groups() const { return static_cast<int>(blockDim.x) / group.width; }
  __device__ int own_group() const { return static_cast<int>(threadIdx.x) / group.width; }

  // Fills the slopes of all pairs, a symmetric matrix; returns the thread's part of the score.
  __device__ T pair_term() const {
    const int tiles = row / kTile;
    const int tasks = tiles * (tiles + 1) / 2;
    for (int first = 0; first < tasks; first += num_groups()) {
      const int own = first + own_group();
      int i = own < tasks ? own : tasks - 1;
      int k = 0;
      while (i > k) i -= ++k;  // tile (i, k), i <= k
      T squares[kTile][kTile];
      tile_squares<T>([&](int a, int d) { return sample(clamp_sample(kTile * i + a), d); },
                      [&](int b, int d) { return sample(clamp_sample(kTile * k + b), d); }, size,
                      group, squares);
      CALM_UNROLL
      for (int a = 0; a < kTile; ++a) {
        CALM_UNROLL
        for (int b = 0; b < kTile; ++b) {
          const int n = kTile * i + a;
          const int other = kTile * k + b;
          const bool lane_stores = ((kTile * a + b) & (group.width - 1)) == group.lane;
          if (lane_stores && own < tasks && n < other && other < num_samples) {
            slopes()[n * row + other] = squares[a][b];
          }
        }
      }
    }
    __syncthreads();
    T score = T(0);
    for (int q = static_cast<int>(threadIdx.x); q < num_samples * num_samples;
         q += static_cast<int>(blockDim.x)) {
      const int n = q / num_samples;
      const int k = q % num_samples;
      if (n == k) slopes()[n * row + n] = T(0);
      if (n >= k) continue;
      const auto pair = power_and_slope(slopes()[n * row + k], arguments.constants);
      score += arguments.pair_weight * pair.power;
      slopes()[n * row + k] = arguments.pair_weight * pair.slope;
      slopes()[k * row + n] = arguments.pair_weight * pair.slope;
    }
    __syncthreads();
    return score;
  }

  // The closed form: fills r and the samples' records; returns the thread's part of the score.
  __device__ T closed_form_term() const {
    T* const sums = shared + layout.sums;
    SpreadSums<T> spread{};
    for (int d = static_cast<int>(threadIdx.x); d < size; d += static_cast<int>(blockDim.x)) {
      const T s = std(d);
      relative()[d] = s * s;
      spread.trace += s * s;
    }
    spread.trace = block_sum(spread.trace, sums);
    const T inverse = inverse_trace(spread.trace);
    for (int d = static_cast<int>(threadIdx.x); d < size; d += static_cast<int>(blockDim.x)) {
      const T r = relative()[d] * inverse;
      relative()[d] = r;
      spread.second += r * r;
      spread.third += r * r * r;
      spread.fourth += (r * r) * (r * r);
    }
    spread.second = block_sum(spread.second, sums);
    spread.third = block_sum(spread.third, sums);
    spread.fourth = block_sum(spread.fourth, sums);

    T score = T(0);
    for (int first = 0; first < num_samples; first += num_groups()) {
      const int own = first + own_group();
      score += sample_record(clamp_sample(own), own < num_samples && group.lane == 0, spread);
    }
    __syncthreads();
    return score;
  }

  // The record of sample n by the lanes of a group; `writes` for the one that keeps it.
  __device__ T sample_record(int n, bool writes, const SpreadSums<T>& spread) const {
    const PowerConstants<T>& constants = arguments.constants;
    T moments[4] = {};
    for (int d = group.lane; d < size; d += group.width) {
      const T offset = sample(n, d) - mean(d);
      const T r = relative()[d];
      const T square = offset * offset;
      moments[0] += square;
      moments[1] += square * r;
      moments[2] += square * (r * r);
      moments[3] += square * (r * r * r);
    }
    for (int j = 0; j < 4; ++j) moments[j] = group_sum(moments[j], group.width);
    const SampleLaw<T> law = sample_law(moments, spread, constants.a);
    MomentFactor<T> factor = moment_factor(law.moments, constants);
    NodeCorrection<T> correction{};
    if (__any_sync(kAllLanes, factor.nodes != 0)) {
      correction = node_correction(n, writes, law, factor.nodes);
    }
    factor.value += correction.value;
    factor.rho += correction.rho;
    if (!writes) return T(0);
    Record& out = record(n);
    out.slopes =
        slope_polynomial(law, factor, correction.projection, arguments.target_weight, constants.a);
    out.inverse_distance = law.inverse_distance;
    out.share = law.share;
    out.nodes = factor.nodes;
    return arguments.target_weight * law.power * factor.value;
  }

  // Groups of a warp walk 16 nodes together; each counts its own `nodes` only.
  __device__ NodeCorrection<T> node_correction(int n, bool writes, const SampleLaw<T>& law,
                                               int nodes) const {
    const PowerConstants<T>& constants = arguments.constants;
    const MomentRule<T>& rule = nodes == 8 ? constants.eight : constants.sixteen;
    NodeCorrection<T> sum{};
    for (int first = 0; first < kMaxNodes; first += kNodeBatch) {
      T logs[kNodeBatch] = {};
      T damped[kNodeBatch] = {};
      T projected[kNodeBatch] = {};
      // 1 + excess is a product of factors 1 + x. Kept without its 1, thousands of small x keep
      // their digits.
      T excess[kNodeBatch] = {};
      int factors = 0;
      for (int d = group.lane; d < size && first < nodes; d += group.width) {
        const T direction = (sample(n, d) - mean(d)) * law.inverse_distance;
        const T e = direction * direction;
        const T w = relative()[d] * law.share;
        const bool take_log = ++factors == kFactorsPerLog || d + group.width >= size;
        CALM_UNROLL
        for (int j = 0; j < kNodeBatch; ++j) {
          const T t2 = T(2) * rule.t[first + j];
          const T x = t2 * w;
          const T inverse = quotient(T(1), T(1) + x);
          const T e_inverse = e * inverse;
          damped[j] += e_inverse;
          projected[j] += e_inverse + w * inverse * (T(1) - t2 * e_inverse);
          excess[j] += x * (T(1) + excess[j]);
          if (take_log) {
            logs[j] += log_one_plus(excess[j]);
            excess[j] = T(0);
          }
        }
        if (take_log) factors = 0;
      }
      CALM_UNROLL
      for (int j = 0; j < kNodeBatch; ++j) {
        const T t = rule.t[first + j];
        const T log_actual = group_sum(T(-0.5) * logs[j] - t * damped[j], group.width);
        const T projection = group_sum(projected[j], group.width);
        if (first + j >= nodes) continue;
        const NodeTerm<T> node =
            node_term(t, rule.weight[first + j], law.moments.rho, log_actual, projection);
        sum.value += node.correction.value;
        sum.rho += node.correction.rho;
        sum.projection += node.correction.projection;
        if (writes) record(n).strength[first + j] = node.strength;
      }
    }
    return sum;
  }

  // Slopes in e and in w of element d of sample n, divided by mu where `e` is.
  struct ElementSlopes {
    T in_offset;  // gradient in the offset
    T in_log_std;
  };
  __device__ ElementSlopes element_slopes(int n, int d, T offset) const {
    const Record& own = record(n);
    const T direction = offset * own.inverse_distance;
    const T e = direction * direction;
    const T w = relative()[d] * own.share;
    T slope = slope_in_e(own.slopes.c, w);
    T by_w = slope + slope_in_w_over_e(own.slopes.c, w) * e;
    const MomentRule<T>& rule =
        own.nodes == 8 ? arguments.constants.eight : arguments.constants.sixteen;
    for (int j = 0; j < own.nodes; ++j) {
      const T t2 = T(2) * rule.t[j];
      const T inverse = quotient(T(1), T(1) + t2 * w);
      const T by_e = own.slopes.scale * own.strength[j] * inverse;
      slope += by_e;
      by_w += by_e * (T(1) - t2 * e * inverse);
    }
    return {slope * direction * own.inverse_distance, by_w * w};
  }

  // Brings targets [m0, m0 + count) to shared memory.
  __device__ void fetch_targets(int64_t m0, int count) const {
    const int threads = static_cast<int>(blockDim.x);
    if (!drawn()) {
      for (int q = static_cast<int>(threadIdx.x); q < count * size; q += threads) {
        targets()[q] = arguments.targets.at(m0 + q / size, p, q % size);
      }
    } else {
      const auto seed = static_cast<uint64_t>(*arguments.seed);
      const int64_t begin = m0 * size;
      const int64_t end = begin + static_cast<int64_t>(count) * size;
      for (int64_t block = begin / 4 + threadIdx.x; 4 * block < end; block += threads) {
        T normals[4];
        normals_of_block(philox(seed, static_cast<uint64_t>(p), static_cast<uint32_t>(block),
                                Stream::kEnergyTargets),
                         normals);
        CALM_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int64_t element = 4 * block + i;
          if (element < begin || element >= end) continue;
          const int q = static_cast<int>(element - begin);
          targets()[q] = std(q % size) * normals[i];
        }
      }
    }
    __syncthreads();
  }

  // Slopes of the samples to the targets at hand; returns the thread's part of the score.
  __device__ T target_term(int count) const {
    const int sample_tiles = row / kTile;
    const int tasks = sample_tiles * ((count + kTile - 1) / kTile);
    for (int first = 0; first < tasks; first += num_groups()) {
      const int own = first + own_group();
      const int task = own < tasks ? own : tasks - 1;
      const int i = task % sample_tiles;
      const int k = task / sample_tiles;
      T squares[kTile][kTile];
      tile_squares<T>([&](int a, int d) { return centred_sample(clamp_sample(kTile * i + a), d); },
                      [&](int b, int d) {
                        const int m = kTile * k + b;
                        return targets()[(m < count ? m : count - 1) * size + d];
                      },
                      size, group, squares);
      CALM_UNROLL
      for (int a = 0; a < kTile; ++a) {
        CALM_UNROLL
        for (int b = 0; b < kTile; ++b) {
          const bool lane_stores = ((kTile * a + b) & (group.width - 1)) == group.lane;
          const int m = kTile * k + b;
          if (lane_stores && own < tasks && m < count) {
            target_slopes()[m * row + kTile * i + a] = squares[a][b];
          }
        }
      }
    }
    __syncthreads();
    T score = T(0);
    for (int q = static_cast<int>(threadIdx.x); q < count * num_samples;
         q += static_cast<int>(blockDim.x)) {
      T& slope = target_slopes()[q / num_samples * row + q % num_samples];
      const auto pair = power_and_slope(slope, arguments.constants);
      score += arguments.target_weight * pair.power;
      slope = arguments.target_weight * pair.slope;
    }
    __syncthreads();
    return score;
  }
};

}  // namespace calm
