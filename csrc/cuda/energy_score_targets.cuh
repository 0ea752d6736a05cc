// The energy score against targets, drawn in the kernel or given, and its gradients: the fast
// kernel, N <= 8 samples, D <= 128, D a multiple of 4. Free of torch.
//
// Fewest bytes: samples, mean and log_std (or targets) read once, score and the wanted gradients
// written once; drawn targets never leave registers. Operations an element and target, N=8: 32 for
// distances and gradient and about 20 for the number itself (Philox 45 for four, Box-Muller 36 for
// four), so M=100 at P=8188, D=128 is 5.5e9 operations of 32 lanes' width: bound by arithmetic,
// 200 us against 9 us for the bytes.
//
// Mapping: a lane owns 4 neighbouring elements of every row, which are one Philox block of a
// target, so a position takes `width` = 32 lanes at D=128. Samples, their gradients and 4 targets
// at a time are in its registers; the 4 N distances of a batch are summed over lanes together
// (energy_score_reduce.cuh), their slopes computed one lane a distance and handed back through
// shared memory: about 7 operations an element and target on top. All differences are formed
// directly.
#pragma once

#include "common/normal.h"
#include "cuda/energy_score_law.cuh"
#include "cuda/energy_score_reduce.cuh"

namespace calm {

constexpr int kTargetsWarps = 2;
// 168 registers a thread, 12 warps on a multiprocessor: enough, with 32 independent sums a thread.
constexpr int kTargetsBlocks = 6;
constexpr int kTargetBatch = 4;
constexpr int kTargetElements = 4;

// Shared memory of a warp, in quads: rows on their way to sums, then the totals of each group.
CALM_HOST_DEVICE constexpr int targets_quads(int width) {
  return kStagingQuads + 32 / width * (kMaxColumns / 4);
}

// Four normals as box_muller makes them, by the special function unit: absolute error below
// 2^-19 times the larger of 1 and 1 / radius. The small radii to which the second belongs are
// rare: one in 5e5 is below 2^-9.
__device__ inline void fast_box_muller(const PhiloxWords& words, float (&out)[4]) {
#ifdef CALM_SIMT
  box_muller(words, out);
#else
  CALM_UNROLL
  for (int pair = 0; pair < 4; pair += 2) {
    // 23 bits below the exponent of 1, minus (1 - 2^-24), are to_uniform's value exactly.
    const float u0 = __uint_as_float((words.word[pair] >> 9) | 0x3f800000u) - (1.0f - 0x1p-24f);
    const float u1 = __uint_as_float((words.word[pair + 1] >> 9) | 0x3f800000u) - (1.0f - 0x1p-24f);
    float log2_u0, radius, sine, cosine;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2_u0) : "f"(u0));
    // The approximate logarithm may be positive next to 1.
    const float square = fmaxf(-2.0f * 0.693147180559945f * log2_u0, 0.0f);
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(radius) : "f"(square));
    const float angle = 6.28318530717958648f * u1;
    asm("sin.approx.ftz.f32 %0, %1;" : "=f"(sine) : "f"(angle));
    asm("cos.approx.ftz.f32 %0, %1;" : "=f"(cosine) : "f"(angle));
    out[pair] = radius * cosine;
    out[pair + 1] = radius * sine;
  }
#endif
}

// philox() of kTargetBatch blocks in step, so that they share the keys.
__device__ inline void philox_batch(uint64_t seed, uint64_t row, uint32_t block, uint32_t step,
                                    PhiloxWords (&out)[kTargetBatch]) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  CALM_UNROLL
  for (uint32_t m = 0; m < kTargetBatch; ++m) {
    out[m] = {{block + m * step, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
               static_cast<uint32_t>(Stream::kEnergyTargets)}};
  }
  CALM_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    CALM_UNROLL
    for (int m = 0; m < kTargetBatch; ++m) {
      uint32_t (&c)[4] = out[m].word;
      const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c[0];
      const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c[2];
      c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0;
      c[1] = static_cast<uint32_t>(product1);
      c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1;
      c[3] = static_cast<uint32_t>(product0);
    }
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
}

// Four elements from `first` on of a row.
template <typename In>
__device__ inline void load_four(const Rows<In>& rows, int64_t n, int64_t p, int first, bool exists,
                                 float (&out)[kTargetElements]) {
  const auto piece = load_piece<In, kTargetElements>(rows.row(n, p) + first, exists);
  CALM_UNROLL
  for (int i = 0; i < kTargetElements; ++i) out[i] = piece[i];
}

template <typename In>
__device__ inline void store_four(In* address, const float (&values)[kTargetElements]) {
  Piece<In, kTargetElements> piece;
  piece.set(values);
  store_piece<In, kTargetElements>(address, piece);
}

// Columns of a batch of targets, and of the pairs.
template <int kSamples>
constexpr int kTargetColumns = padded_columns(kTargetBatch * kSamples);
template <int kSamples>
constexpr int kTargetPairColumns = padded_columns(num_pairs(kSamples));

// Sums the pairs' distances, leaves their slopes in `totals` and returns this lane's score.
template <typename In, int kSamples>
__device__ inline float pair_term(const EnergyArguments<In>& arguments,
                                  const float (&x)[kSamples][kTargetElements],
                                  const LaneGroup& group, Float4* staging, Float4* totals) {
  float columns[kTargetPairColumns<kSamples>] = {};
  CALM_UNROLL
  for (int k = 0; k < kSamples; ++k) {
    CALM_UNROLL
    for (int n = 0; n < k; ++n) {
      CALM_UNROLL
      for (int i = 0; i < kTargetElements; ++i) {
        const float difference = x[n][i] - x[k][i];
        columns[pair_index(n, k)] += difference * difference;
      }
    }
  }
  sum_columns(columns, staging, totals, group);
  float* const numbers = totals->value;
  float score = 0.0f;
  for (int q = group.lane; q < num_pairs(kSamples); q += group.width) {
    const PowerAndSlope<float> pair = power_and_slope(numbers[q], arguments.constants);
    score += arguments.pair_weight * pair.power;
    numbers[q] = arguments.pair_weight * pair.slope;
  }
  __syncwarp();
  return score;
}

template <typename In, int kSamples>
__global__ void __launch_bounds__(kTargetsWarps * 32, kTargetsBlocks)
    targets_kernel(const __grid_constant__ EnergyArguments<In> arguments, const int log2_width) {
  constexpr int kColumns = kTargetColumns<kSamples>;
  CALM_DYNAMIC_SHARED_ARRAY(Float4, shared);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const LaneGroup group(log2_width);
  Float4* const staging = shared + warp * targets_quads(group.width);
  Float4* const totals = staging + kStagingQuads + group.index * (kMaxColumns / 4);
  float* const numbers = totals->value;

  const EnergyShape& shape = arguments.shape;
  const int first = group.lane * kTargetElements;
  const bool owns = first < shape.size;
  const bool drawn = arguments.seed != nullptr;
  const bool wants_samples = arguments.grad_samples != nullptr;
  const bool wants_law = arguments.grad_mean != nullptr || arguments.grad_log_std != nullptr;
  const bool wants_targets = arguments.grad_targets != nullptr || wants_law;

  const int64_t group_position =
      ((static_cast<int64_t>(blockIdx.x) * kTargetsWarps + warp) << (5 - log2_width)) + group.index;
  const bool live = group_position < shape.num_positions;
  const int64_t p = live ? group_position : shape.num_positions - 1;
  const bool stores = live && owns;

  float x[kSamples][kTargetElements];
  CALM_UNROLL
  for (int n = 0; n < kSamples; ++n) {
    load_four(arguments.samples, n, p, first, owns, x[n]);
  }
  float score = pair_term<In, kSamples>(arguments, x, group, staging, totals);

  forget(x);
  float grad[kSamples][kTargetElements] = {};
  if (wants_samples) {
    CALM_UNROLL
    for (int k = 0; k < kSamples; ++k) {
      CALM_UNROLL
      for (int n = 0; n < k; ++n) {
        const float slope = numbers[pair_index(n, k)];
        CALM_UNROLL
        for (int i = 0; i < kTargetElements; ++i) {
          const float pull = slope * (x[n][i] - x[k][i]);
          grad[n][i] += pull;
          grad[k][i] -= pull;
        }
      }
    }
  }

  // Drawn targets are used without their mean, and the samples then too.
  float std[kTargetElements] = {};
  uint64_t seed = 0;
  if (drawn) {
    float mean[kTargetElements];
    load_four(arguments.mean, 0, p, first, owns, mean);
    load_four(arguments.log_std, 0, p, first, owns, std);
    CALM_UNROLL
    for (int i = 0; i < kTargetElements; ++i) {
      std[i] = owns ? exponential(std[i]) : 0.0f;
      CALM_UNROLL
      for (int n = 0; n < kSamples; ++n) x[n][i] -= mean[i];
    }
    seed = static_cast<uint64_t>(*arguments.seed);
  }

  float grad_mean[kTargetElements] = {};
  float grad_log_std[kTargetElements] = {};
  for (int64_t m0 = 0; m0 < shape.num_targets; m0 += kTargetBatch) {
    const int64_t left = shape.num_targets - m0;
    const int count = left < kTargetBatch ? static_cast<int>(left) : kTargetBatch;
    float y[kTargetBatch][kTargetElements];
    if (drawn) {
      PhiloxWords words[kTargetBatch];
      philox_batch(seed, static_cast<uint64_t>(p),
                   static_cast<uint32_t>((m0 * shape.size + first) / kTargetElements),
                   static_cast<uint32_t>(shape.size / kTargetElements), words);
      CALM_UNROLL
      for (int m = 0; m < kTargetBatch; ++m) {
        fast_box_muller(words[m], y[m]);
        CALM_UNROLL
        for (int i = 0; i < kTargetElements; ++i) y[m][i] *= std[i];
      }
    } else {
      CALM_UNROLL
      for (int m = 0; m < kTargetBatch; ++m) {
        load_four(arguments.targets, m0 + m, p, first, owns && m < count, y[m]);
      }
    }

    float columns[kColumns] = {};
    CALM_UNROLL
    for (int m = 0; m < kTargetBatch; ++m) {
      CALM_UNROLL
      for (int n = 0; n < kSamples; ++n) {
        CALM_UNROLL
        for (int i = 0; i < kTargetElements; ++i) {
          const float difference = x[n][i] - y[m][i];
          columns[m * kSamples + n] += difference * difference;
        }
      }
    }
    sum_columns(columns, staging, totals, group);
    for (int q = group.lane; q < kTargetBatch * kSamples; q += group.width) {
      const bool exists = q < count * kSamples;
      const PowerAndSlope<float> pair =
          power_and_slope(exists ? numbers[q] : 0.0f, arguments.constants);
      score += arguments.target_weight * pair.power;
      numbers[q] = arguments.target_weight * pair.slope;
    }
    __syncwarp();

    forget(y);
    if (wants_samples) {
      CALM_UNROLL
      for (int m = 0; m < kTargetBatch; ++m) {
        CALM_UNROLL
        for (int n = 0; n < kSamples; ++n) {
          const float slope = numbers[m * kSamples + n];
          CALM_UNROLL
          for (int i = 0; i < kTargetElements; ++i) grad[n][i] += slope * (x[n][i] - y[m][i]);
        }
      }
    }
    if (wants_targets) {
      forget(y);
      CALM_UNROLL
      for (int m = 0; m < kTargetBatch; ++m) {
        float pull[kTargetElements] = {};
        CALM_UNROLL
        for (int n = 0; n < kSamples; ++n) {
          const float slope = numbers[m * kSamples + n];
          CALM_UNROLL
          for (int i = 0; i < kTargetElements; ++i) pull[i] += slope * (y[m][i] - x[n][i]);
        }
        CALM_UNROLL
        for (int i = 0; i < kTargetElements; ++i) {
          grad_mean[i] += pull[i];
          grad_log_std[i] += pull[i] * y[m][i];
        }
        if (stores && m < count && arguments.grad_targets != nullptr) {
          store_four(arguments.grad_targets + arguments.dense(m0 + m, p) + first, pull);
        }
      }
    }
  }

  score = group_sum(score, group.width);
  if (live && group.lane == 0) arguments.score[p] = score;
  if (stores && wants_samples) {
    CALM_UNROLL
    for (int n = 0; n < kSamples; ++n) {
      store_four(arguments.grad_samples + arguments.dense(n, p) + first, grad[n]);
    }
  }
  if (stores && arguments.grad_mean != nullptr) {
    store_four(arguments.grad_mean + arguments.dense(0, p) + first, grad_mean);
  }
  if (stores && arguments.grad_log_std != nullptr) {
    store_four(arguments.grad_log_std + arguments.dense(0, p) + first, grad_log_std);
  }
}

}  // namespace calm
