// The block kernel's gradients, and the kernel itself; mapping and costs are told in
// energy_score_block.cuh.
#pragma once

#include "cuda/energy_score_block.cuh"

namespace calm {

// Where partial gradients wait between batches of targets.
template <typename T>
struct PartialGradients {
  T* samples;
  int64_t sample_stride;
  T* mean;
  T* log_std;
};

template <typename In>
__device__ inline PartialGradients<Compute<In>> partial_gradients(
    const EnergyArguments<In>& arguments, int64_t p) {
  const EnergyShape& shape = arguments.shape;
  const int64_t start = arguments.dense(0, p);
  if constexpr (std::is_same_v<In, Compute<In>>) {
    return {arguments.grad_samples == nullptr ? nullptr : arguments.grad_samples + start,
            shape.num_positions * shape.size,
            arguments.grad_mean == nullptr ? nullptr : arguments.grad_mean + start,
            arguments.grad_log_std == nullptr ? nullptr : arguments.grad_log_std + start};
  } else {
    if (arguments.workspace == nullptr) return {};
    Compute<In>* const own =
        arguments.workspace + blockIdx.x * (shape.num_samples + 2) * shape.size;
    return {own, shape.size, own + shape.num_samples * shape.size,
            own + (shape.num_samples + 1) * shape.size};
  }
}

// The batch of targets that gradients are taken over; `count` is 0 with the closed form.
struct TargetBatch {
  int64_t first;
  int count;
  bool begins;
  bool ends;
};

template <typename In>
__device__ inline void sample_gradients(const BlockPosition<In>& position, const TargetBatch& batch,
                                        const PartialGradients<Compute<In>>& partial) {
  using T = Compute<In>;
  const EnergyArguments<In>& arguments = position.arguments;
  const int size = position.size;
  const int items = position.row / kTile * size;
  for (int item = static_cast<int>(threadIdx.x); item < items;
       item += static_cast<int>(blockDim.x)) {
    const int tile = item / size * kTile;
    const int d = item % size;
    T x[kTile];
    T gradient[kTile];
    CALM_UNROLL
    for (int a = 0; a < kTile; ++a) {
      const int n = position.clamp_sample(tile + a);
      x[a] = position.sample(n, d);
      gradient[a] = batch.begins ? T(0) : partial.samples[n * partial.sample_stride + d];
    }
    const T center = position.drawn() ? position.mean(d) : T(0);
    for (int m = 0; m < batch.count; ++m) {
      const T y = position.targets()[m * size + d];
      const T* slopes = position.target_slopes() + m * position.row + tile;
      CALM_UNROLL
      for (int a = 0; a < kTile; ++a) gradient[a] += slopes[a] * ((x[a] - center) - y);
    }
    if (batch.ends) {
      for (int k = 0; k < position.num_samples; ++k) {
        const T other = position.sample(k, d);
        CALM_UNROLL
        for (int a = 0; a < kTile; ++a) {
          const int n = position.clamp_sample(tile + a);
          gradient[a] += position.slopes()[k * position.row + n] * (x[a] - other);
        }
      }
    }
    CALM_UNROLL
    for (int a = 0; a < kTile; ++a) {
      const int n = tile + a;
      if (n >= position.num_samples) continue;
      if (batch.count == 0) {
        gradient[a] += position.element_slopes(n, d, x[a] - position.mean(d)).in_offset;
      }
      if (batch.ends) {
        arguments.grad_samples[arguments.dense(n, position.p) + d] = narrow<In>(gradient[a]);
      } else {
        partial.samples[n * partial.sample_stride + d] = gradient[a];
      }
    }
  }
}

// Gradients in mean and log_std, or in the targets at hand.
template <typename In>
__device__ inline void target_gradients(const BlockPosition<In>& position, const TargetBatch& batch,
                                        const PartialGradients<Compute<In>>& partial) {
  using T = Compute<In>;
  const EnergyArguments<In>& arguments = position.arguments;
  const int size = position.size;
  for (int d = static_cast<int>(threadIdx.x); d < size; d += static_cast<int>(blockDim.x)) {
    const bool waits = !batch.begins && position.drawn();
    T grad_mean = waits && arguments.grad_mean != nullptr ? partial.mean[d] : T(0);
    T grad_log_std = waits && arguments.grad_log_std != nullptr ? partial.log_std[d] : T(0);
    for (int m = 0; m < batch.count; ++m) {
      const T y = position.targets()[m * size + d];
      T pull = T(0);
      for (int n = 0; n < position.num_samples; ++n) {
        pull +=
            position.target_slopes()[m * position.row + n] * (y - position.centred_sample(n, d));
      }
      grad_mean += pull;
      grad_log_std += pull * y;
      if (arguments.grad_targets != nullptr) {
        arguments.grad_targets[arguments.dense(batch.first + m, position.p) + d] = narrow<In>(pull);
      }
    }
    if (batch.count == 0) {
      const T center = position.mean(d);
      for (int n = 0; n < position.num_samples; ++n) {
        const auto slopes = position.element_slopes(n, d, position.sample(n, d) - center);
        grad_mean -= slopes.in_offset;
        grad_log_std += slopes.in_log_std;
      }
    }
    const int64_t place = arguments.dense(0, position.p) + d;
    if (arguments.grad_mean != nullptr) {
      if (batch.ends) arguments.grad_mean[place] = narrow<In>(grad_mean);
      if (!batch.ends) partial.mean[d] = grad_mean;
    }
    if (arguments.grad_log_std != nullptr) {
      if (batch.ends) arguments.grad_log_std[place] = narrow<In>(grad_log_std);
      if (!batch.ends) partial.log_std[d] = grad_log_std;
    }
  }
}

template <typename In>
__global__ void __launch_bounds__(kBlockThreads)
    block_kernel(const __grid_constant__ EnergyArguments<In> arguments,
                 const __grid_constant__ BlockLayout layout, const int log2_width) {
  using T = Compute<In>;
  CALM_DYNAMIC_SHARED_ARRAY(Float4, shared);
  BlockPosition<In> position(arguments, layout, log2_width, reinterpret_cast<T*>(shared));
  const EnergyShape& shape = arguments.shape;
  const bool wants_samples = arguments.grad_samples != nullptr;
  const bool wants_targets = arguments.grad_mean != nullptr || arguments.grad_log_std != nullptr ||
                             arguments.grad_targets != nullptr;
  for (int64_t p = blockIdx.x; p < shape.num_positions; p += gridDim.x) {
    position.p = p;
    const PartialGradients<T> partial = partial_gradients(arguments, p);
    T score = position.pair_term();
    if (shape.num_targets == 0) {
      score += position.closed_form_term();
      const TargetBatch none{0, 0, true, true};
      if (wants_samples) sample_gradients(position, none, partial);
      if (wants_targets) target_gradients(position, none, partial);
    }
    for (int64_t m = 0; m < shape.num_targets; m += layout.batch) {
      const int64_t left = shape.num_targets - m;
      const TargetBatch batch{m, static_cast<int>(left < layout.batch ? left : layout.batch),
                              m == 0, left <= layout.batch};
      position.fetch_targets(batch.first, batch.count);
      score += position.target_term(batch.count);
      if (wants_samples) sample_gradients(position, batch, partial);
      if (wants_targets) target_gradients(position, batch, partial);
      __syncthreads();
    }
    score = block_sum(score, position.shared + layout.sums);
    if (threadIdx.x == 0) arguments.score[p] = score;
  }
}

}  // namespace calm
