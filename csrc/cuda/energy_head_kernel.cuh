// The pointwise steps of a block of the energy head between its matmuls: the device code, free of
// torch. Rows are dense, `size` = H numbers; row r belongs to position r / num_samples. The
// arithmetic is in float (double for double).
//
// Mapping: the norm's kernels give a row to a warp, which reads it two or three times, from L1
// after the first; the element-wise kernels walk all elements with a grid stride, neighbours in
// neighbouring lanes; sums over rows give a column to a thread and a stretch of rows to a block, so
// that reads are neighbouring, and are finished by a second launch over the stretches: the same
// bits in every run. Bound by memory throughout. Fewest bytes, in numbers a row: norm 2H, its
// backward 4H, silu 3H, its backward 4H, gate 5H, its backward 6H; a column sum reads its rows.
#pragma once

#include <cstdint>

#include "cuda/energy_score_types.cuh"

namespace calm {

constexpr int kHeadThreads = 256;
constexpr int kHeadWarps = kHeadThreads / 32;
// Rows that one thread sums in a column: enough threads at 64k rows, few enough partial sums.
constexpr int64_t kHeadSumRows = 64;

__device__ inline float negative_exponential(float x) { return expf(-x); }
__device__ inline double negative_exponential(double x) { return exp(-x); }

template <typename T>
__device__ inline T sigmoid(T x) {
  return T(1) / (T(1) + negative_exponential(x));
}

// d silu(x) / dx, given sigmoid(x).
template <typename T>
__device__ inline T silu_slope(T x, T sigmoid_of_x) {
  return sigmoid_of_x * (T(1) + x * (T(1) - sigmoid_of_x));
}

template <typename T>
__device__ inline T warp_sum(T value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

// Calls function(i) for every i < count.
template <typename Function>
__device__ inline void for_elements(int64_t count, const Function& function) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kHeadThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kHeadThreads + threadIdx.x; i < count;
       i += step) {
    function(i);
  }
}

// Calls function(row, lane) with a row a warp; all lanes of a warp come together.
template <typename Function>
__device__ inline void for_warp_rows(int64_t num_rows, const Function& function) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kHeadWarps;
  for (int64_t r = static_cast<int64_t>(blockIdx.x) * kHeadWarps + threadIdx.x / 32; r < num_rows;
       r += step) {
    function(r, lane);
  }
}

// normed = (x - mean) * rstd * weight + bias; mean and rstd are kept.
template <typename S>
__global__ void __launch_bounds__(kHeadThreads)
    layer_norm_kernel(const S* __restrict__ x, const S* __restrict__ weight,
                      const S* __restrict__ bias, S* __restrict__ normed,
                      Compute<S>* __restrict__ mean, Compute<S>* __restrict__ rstd,
                      const int64_t num_rows, const int64_t size, const double eps) {
  using T = Compute<S>;
  for_warp_rows(num_rows, [&](int64_t r, int lane) {
    const S* row = x + r * size;
    T total = 0;
    for (int64_t h = lane; h < size; h += 32) total += widen(row[h]);
    const T centre = warp_sum(total) / static_cast<T>(size);
    T squares = 0;
    for (int64_t h = lane; h < size; h += 32) {
      const T centred = widen(row[h]) - centre;
      squares += centred * centred;
    }
    const T variance = warp_sum(squares) / static_cast<T>(size);
    const T scale = T(1) / sqrt(variance + static_cast<T>(eps));
    for (int64_t h = lane; h < size; h += 32) {
      const T unit = (widen(row[h]) - centre) * scale;
      normed[r * size + h] = narrow<S>(unit * widen(weight[h]) + widen(bias[h]));
    }
    if (lane == 0) {
      mean[r] = centre;
      rstd[r] = scale;
    }
  });
}

// grad_x = gradient of x given that of normed, with the residual's added. May not alias.
template <typename S>
__global__ void __launch_bounds__(kHeadThreads)
    layer_norm_backward_kernel(const S* __restrict__ x, const S* __restrict__ weight,
                               const Compute<S>* __restrict__ mean,
                               const Compute<S>* __restrict__ rstd,
                               const S* __restrict__ grad_normed, const S* __restrict__ grad_out,
                               S* __restrict__ grad_x, const int64_t num_rows, const int64_t size) {
  using T = Compute<S>;
  for_warp_rows(num_rows, [&](int64_t r, int lane) {
    const int64_t start = r * size;
    T by_one = 0;
    T by_unit = 0;
    for (int64_t h = lane; h < size; h += 32) {
      const T unit = (widen(x[start + h]) - mean[r]) * rstd[r];
      const T grad_unit = widen(grad_normed[start + h]) * widen(weight[h]);
      by_one += grad_unit;
      by_unit += grad_unit * unit;
    }
    // Shifting or scaling x leaves unit unchanged: both components are taken off.
    const T shift = warp_sum(by_one) / static_cast<T>(size);
    const T scale = warp_sum(by_unit) / static_cast<T>(size);
    for (int64_t h = lane; h < size; h += 32) {
      const T unit = (widen(x[start + h]) - mean[r]) * rstd[r];
      const T grad_unit = widen(grad_normed[start + h]) * widen(weight[h]);
      const T passed = widen(grad_out[start + h]);
      grad_x[start + h] = narrow<S>((grad_unit - shift - unit * scale) * rstd[r] + passed);
    }
  });
}

// x += shared[position] where shared is given; activated = silu(x).
template <typename S>
__global__ void __launch_bounds__(kHeadThreads)
    silu_kernel(S* __restrict__ x, const S* __restrict__ shared, S* __restrict__ activated,
                const int64_t num_rows, const int64_t num_samples, const int64_t size) {
  using T = Compute<S>;
  for_elements(num_rows * size, [&](int64_t i) {
    T v = widen(x[i]);
    if (shared != nullptr) {
      v += widen(shared[i / size / num_samples * size + i % size]);
      x[i] = narrow<S>(v);
    }
    activated[i] = narrow<S>(v * sigmoid(v));
  });
}

// grad holds the gradient of silu(x) and becomes that of x; activated = silu(x).
template <typename S>
__global__ void __launch_bounds__(kHeadThreads)
    silu_backward_kernel(const S* __restrict__ x, S* __restrict__ grad, S* __restrict__ activated,
                         const int64_t count) {
  using T = Compute<S>;
  for_elements(count, [&](int64_t i) {
    const T v = widen(x[i]);
    const T s = sigmoid(v);
    activated[i] = narrow<S>(v * s);
    grad[i] = narrow<S>(widen(grad[i]) * silu_slope(v, s));
  });
}

// product = silu(gate) * up, gate_up [num_rows, 2 size] holds gate beside up; out = x + bias.
template <typename S>
__global__ void __launch_bounds__(kHeadThreads)
    gated_kernel(const S* __restrict__ gate_up, const S* __restrict__ x, const S* __restrict__ bias,
                 S* __restrict__ product, S* __restrict__ out, const int64_t num_rows,
                 const int64_t size) {
  using T = Compute<S>;
  for_elements(num_rows * size, [&](int64_t i) {
    const int64_t h = i % size;
    const int64_t pair = 2 * (i - h) + h;
    const T gate = widen(gate_up[pair]);
    product[i] = narrow<S>(gate * sigmoid(gate) * widen(gate_up[pair + size]));
    out[i] = narrow<S>(widen(x[i]) + widen(bias[h]));
  });
}

// product holds its own gradient and becomes silu(gate) * up; grad_gate_up is written.
template <typename S>
__global__ void __launch_bounds__(kHeadThreads)
    gated_backward_kernel(const S* __restrict__ gate_up, S* __restrict__ product,
                          S* __restrict__ grad_gate_up, const int64_t num_rows,
                          const int64_t size) {
  using T = Compute<S>;
  for_elements(num_rows * size, [&](int64_t i) {
    const int64_t h = i % size;
    const int64_t pair = 2 * (i - h) + h;
    const T gate = widen(gate_up[pair]);
    const T up = widen(gate_up[pair + size]);
    const T grad = widen(product[i]);
    const T s = sigmoid(gate);
    product[i] = narrow<S>(gate * s * up);
    grad_gate_up[pair] = narrow<S>(grad * up * silu_slope(gate, s));
    grad_gate_up[pair + size] = narrow<S>(grad * gate * s);
  });
}

// sum[p] = sum over the samples of position p of rows [num_positions * num_samples, size].
template <typename S>
__global__ void __launch_bounds__(kHeadThreads)
    sample_sum_kernel(const S* __restrict__ rows, S* __restrict__ sum, const int64_t num_positions,
                      const int64_t num_samples, const int64_t size) {
  for_elements(num_positions * size, [&](int64_t i) {
    const S* first = rows + i / size * num_samples * size + i % size;
    Compute<S> total = 0;
    for (int64_t n = 0; n < num_samples; ++n) total += widen(first[n * size]);
    sum[i] = narrow<S>(total);
  });
}

// partial[s, h] = sum of values[r, h] over rows r of stretch s, and weighted by the unit row of x
// where x is given: the gradients of a norm's bias and weight.
template <typename S>
struct ColumnSums {
  const S* values;
  const S* x;
  const Compute<S>* mean;
  const Compute<S>* rstd;
  Compute<S>* partial;
  Compute<S>* partial_by_unit;
  int64_t num_rows;
  int64_t size;
};

template <typename S>
__global__ void __launch_bounds__(kHeadThreads) column_sums_kernel(const ColumnSums<S> sums) {
  using T = Compute<S>;
  const int64_t num_stretches = (sums.num_rows + kHeadSumRows - 1) / kHeadSumRows;
  for_elements(num_stretches * sums.size, [&](int64_t i) {
    const int64_t h = i % sums.size;
    const int64_t first = i / sums.size * kHeadSumRows;
    const int64_t end = first + kHeadSumRows < sums.num_rows ? first + kHeadSumRows : sums.num_rows;
    T total = 0;
    T by_unit = 0;
    for (int64_t r = first; r < end; ++r) {
      const T value = widen(sums.values[r * sums.size + h]);
      total += value;
      if (sums.x != nullptr) {
        by_unit += value * ((widen(sums.x[r * sums.size + h]) - sums.mean[r]) * sums.rstd[r]);
      }
    }
    sums.partial[i] = total;
    if (sums.x != nullptr) sums.partial_by_unit[i] = by_unit;
  });
}

// sum[h] = sum over the stretches of partial [num_stretches, size].
template <typename S>
__global__ void __launch_bounds__(kHeadThreads)
    finish_sums_kernel(const Compute<S>* __restrict__ partial, S* __restrict__ sum,
                       const int64_t num_stretches, const int64_t size) {
  for_elements(size, [&](int64_t h) {
    Compute<S> total = 0;
    for (int64_t s = 0; s < num_stretches; ++s) total += partial[s * size + h];
    sum[h] = narrow<S>(total);
  });
}

}  // namespace calm
