// The gated feed-forward block between its matmuls: the device code, free of torch.
//
//   rms_norm            x -> rstd, n = x rstd w           reads H, writes H and one number a row
//   swiglu              gate, up -> silu(gate) up         reads 2 I, writes I
//   swiglu_backward     gate, up, grad of the product     reads 3 I, writes 3 I: gradients of gate
//                       and up, and the product again, over its gradient
//   rms_norm_backward   x, grad of n, grad_out -> grad_x  reads 3 H, writes H; sums over rows for w
//
// So every activation is read once and written once between two matmuls, which is the fewest bytes
// that whole matmuls allow; the arithmetic (one exponential and one quotient an element) stays
// below the time of those bytes. What is cheap, n and the product, is computed again in the
// backward instead of being kept.
//
// Mapping: a warp takes a row and its lanes walk it 16 bytes at a time, so that reductions over the
// row are shuffles and nothing waits for other warps. Rows whose size or address is no multiple of
// 16 bytes go element by element (kCount = 1). The norms pass over a row twice; the second pass
// finds it in L1.
//
// The gradient of w is a sum over all rows in two stages of fixed order: every warp sums its rows
// into a line of its own, the block adds its warps' lines, and column_sum_kernel adds the blocks'.
// The lines lie in shared memory, or in global memory where they do not fit.
#pragma once

#include <cstdint>

#include "cuda/energy_score_types.cuh"
#include "cuda/shared_memory.cuh"

namespace calm {

constexpr int kFfnWarpsPerBlock = 8;
constexpr int kFfnThreads = kFfnWarpsPerBlock * 32;

// Elements that a lane takes at once: 16 bytes of them.
template <typename In>
constexpr int kFfnVector = sizeof(In) <= 4 ? static_cast<int>(16 / sizeof(In)) : 1;

template <typename In, int kCount>
__device__ inline void load_values(const In* address, Compute<In> (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = widen(*address);
  } else {
    const Piece<In, kCount> piece = load_piece<In, kCount>(address, true);
    CALM_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = piece[i];
  }
}

template <typename In, int kCount>
__device__ inline void store_values(In* address, const Compute<In> (&values)[kCount]) {
  if constexpr (kCount == 1) {
    *address = narrow<In>(values[0]);
  } else {
    Piece<In, kCount> piece;
    piece.set(values);
    store_piece<In, kCount>(address, piece);
  }
}

template <typename T>
__device__ inline T warp_sum(T value) {
  CALM_UNROLL
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

__device__ inline float sigmoid(float x) { return quotient(1.0f, 1.0f + expf(-x)); }
__device__ inline double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

// Row of the calling warp; the grid strides over the rows by row_step().
__device__ inline int64_t first_row() {
  return static_cast<int64_t>(blockIdx.x) * kFfnWarpsPerBlock + threadIdx.x / 32;
}
__device__ inline int64_t row_step() { return static_cast<int64_t>(gridDim.x) * kFfnWarpsPerBlock; }
template <int kCount>
__device__ inline int64_t first_element() {
  return static_cast<int64_t>(threadIdx.x % 32) * kCount;
}

template <typename In>
struct RmsNormArguments {
  const In* x;
  const In* norm_weight;
  In* normed;
  Compute<In>* rstd;
  int64_t num_rows;
  int64_t size;
  double eps;
  bool has_rstd;  // rstd is read instead of being written
};

template <typename In, int kCount>
__global__ void __launch_bounds__(kFfnThreads)
    rms_norm_kernel(const RmsNormArguments<In> arguments) {
  using T = Compute<In>;
  const int64_t size = arguments.size;
  for (int64_t row = first_row(); row < arguments.num_rows; row += row_step()) {
    const In* x = arguments.x + row * size;
    T rstd;
    if (arguments.has_rstd) {
      rstd = arguments.rstd[row];
    } else {
      T squares = 0;
      for (int64_t i = first_element<kCount>(); i < size; i += 32 * kCount) {
        T values[kCount];
        load_values<In, kCount>(x + i, values);
        CALM_UNROLL
        for (int k = 0; k < kCount; ++k) squares += values[k] * values[k];
      }
      rstd = T(1) /
             square_root(warp_sum(squares) / static_cast<T>(size) + static_cast<T>(arguments.eps));
      if (threadIdx.x % 32 == 0) arguments.rstd[row] = rstd;
    }
    for (int64_t i = first_element<kCount>(); i < size; i += 32 * kCount) {
      T values[kCount];
      T weights[kCount];
      load_values<In, kCount>(x + i, values);
      load_values<In, kCount>(arguments.norm_weight + i, weights);
      CALM_UNROLL
      for (int k = 0; k < kCount; ++k) values[k] *= rstd * weights[k];
      store_values<In, kCount>(arguments.normed + row * size + i, values);
    }
  }
}

// gate_up [num_rows, 2 size] holds gate beside up.
template <typename In>
struct SwigluArguments {
  const In* gate_up;
  In* product;
  In* grad_gate_up;  // of the backward alone
  int64_t num_rows;
  int64_t size;
};

template <typename In, int kCount>
__global__ void __launch_bounds__(kFfnThreads) swiglu_kernel(const SwigluArguments<In> arguments) {
  using T = Compute<In>;
  const int64_t size = arguments.size;
  for (int64_t row = first_row(); row < arguments.num_rows; row += row_step()) {
    const In* gates = arguments.gate_up + row * 2 * size;
    for (int64_t i = first_element<kCount>(); i < size; i += 32 * kCount) {
      T gate[kCount];
      T up[kCount];
      load_values<In, kCount>(gates + i, gate);
      load_values<In, kCount>(gates + size + i, up);
      CALM_UNROLL
      for (int k = 0; k < kCount; ++k) up[k] *= gate[k] * sigmoid(gate[k]);
      store_values<In, kCount>(arguments.product + row * size + i, up);
    }
  }
}

// product holds its own gradient and becomes silu(gate) up.
template <typename In, int kCount>
__global__ void __launch_bounds__(kFfnThreads)
    swiglu_backward_kernel(const SwigluArguments<In> arguments) {
  using T = Compute<In>;
  const int64_t size = arguments.size;
  for (int64_t row = first_row(); row < arguments.num_rows; row += row_step()) {
    const In* gates = arguments.gate_up + row * 2 * size;
    In* product = arguments.product + row * size;
    In* grads = arguments.grad_gate_up + row * 2 * size;
    for (int64_t i = first_element<kCount>(); i < size; i += 32 * kCount) {
      T gate[kCount];
      T up[kCount];
      T grad[kCount];
      load_values<In, kCount>(gates + i, gate);
      load_values<In, kCount>(gates + size + i, up);
      load_values<In, kCount>(product + i, grad);
      CALM_UNROLL
      for (int k = 0; k < kCount; ++k) {
        const T share = sigmoid(gate[k]);
        const T activated = gate[k] * share;
        const T grad_gate = grad[k] * up[k] * (share * (T(1) + gate[k] * (T(1) - share)));
        up[k] *= activated;
        grad[k] *= activated;
        gate[k] = grad_gate;
      }
      store_values<In, kCount>(product + i, up);
      store_values<In, kCount>(grads + i, gate);
      store_values<In, kCount>(grads + size + i, grad);
    }
  }
}

template <typename In>
struct RmsNormBackwardArguments {
  const In* x;
  const In* norm_weight;
  const Compute<In>* rstd;
  const In* grad_normed;
  const In* grad_residual;  // or null
  In* grad_x;               // may be grad_normed
  Compute<In>* partial;     // [blocks, size]: the sums of every block
  Compute<In>* lines;       // [blocks, kFfnWarpsPerBlock, line size], or null: in shared memory
  int64_t num_rows;
  int64_t size;
};

// Numbers in a warp's line. Element k of a lane's piece lies 32 after element k - 1, so that the
// lanes of a warp touch neighbouring numbers.
template <int kCount>
CALM_HOST_DEVICE constexpr int64_t ffn_line_size(int64_t size) {
  constexpr int64_t kStep = 32 * kCount;
  return (size + kStep - 1) / kStep * kStep;
}

// Where the sum of column `i` lies in a line.
template <int kCount>
__device__ inline int64_t line_index(int64_t i) {
  const int64_t piece = i / kCount;
  return ((piece / 32) * kCount + i % kCount) * 32 + piece % 32;
}

// Dynamic shared memory: kFfnWarpsPerBlock lines, if they lie there.
template <typename In, int kCount>
__global__ void __launch_bounds__(kFfnThreads)
    rms_norm_backward_kernel(const RmsNormBackwardArguments<In> arguments) {
  using T = Compute<In>;
  CALM_DYNAMIC_SHARED_ARRAY(char, shared);
  const int64_t size = arguments.size;
  const int64_t line_size = ffn_line_size<kCount>(size);
  T* const lines = arguments.lines == nullptr ? reinterpret_cast<T*>(shared)
                                              : arguments.lines + static_cast<int64_t>(blockIdx.x) *
                                                                      kFfnWarpsPerBlock * line_size;
  T* const line = lines + static_cast<int64_t>(threadIdx.x / 32) * line_size;
  const int64_t lane = threadIdx.x % 32;
  // A lane reads and writes its own numbers of the line only, until the block adds them up.
  for (int64_t i = lane; i < line_size; i += 32) line[i] = 0;

  for (int64_t row = first_row(); row < arguments.num_rows; row += row_step()) {
    const In* x = arguments.x + row * size;
    const In* grad_normed = arguments.grad_normed + row * size;
    In* grad_x = arguments.grad_x + row * size;
    const T rstd = arguments.rstd[row];
    T along = 0;
    for (int64_t i = first_element<kCount>(); i < size; i += 32 * kCount) {
      T grad[kCount];
      T unit[kCount];
      T weight[kCount];
      load_values<In, kCount>(grad_normed + i, grad);
      load_values<In, kCount>(x + i, unit);
      load_values<In, kCount>(arguments.norm_weight + i, weight);
      T* const sums = line + (i - lane * kCount) + lane;
      CALM_UNROLL
      for (int k = 0; k < kCount; ++k) {
        const T by_unit = grad[k] * (unit[k] * rstd);
        sums[k * 32] += by_unit;
        along += by_unit * weight[k];
      }
    }
    // Scaling x leaves the unit vector unchanged: the component along it is taken off.
    along = warp_sum(along) / static_cast<T>(size);
    for (int64_t i = first_element<kCount>(); i < size; i += 32 * kCount) {
      T grad[kCount];
      T unit[kCount];
      T weight[kCount];
      T residual[kCount] = {};
      load_values<In, kCount>(grad_normed + i, grad);
      load_values<In, kCount>(x + i, unit);
      load_values<In, kCount>(arguments.norm_weight + i, weight);
      if (arguments.grad_residual != nullptr) {
        load_values<In, kCount>(arguments.grad_residual + row * size + i, residual);
      }
      CALM_UNROLL
      for (int k = 0; k < kCount; ++k) {
        grad[k] = (grad[k] * weight[k] - unit[k] * rstd * along) * rstd + residual[k];
      }
      store_values<In, kCount>(grad_x + i, grad);
    }
  }

  __syncthreads();
  T* const partial = arguments.partial + static_cast<int64_t>(blockIdx.x) * size;
  for (int64_t i = threadIdx.x; i < size; i += kFfnThreads) {
    const int64_t at = line_index<kCount>(i);
    T sum = 0;
    for (int warp = 0; warp < kFfnWarpsPerBlock; ++warp) sum += lines[warp * line_size + at];
    partial[i] = sum;
  }
}

// out[i] = sum over rows of partial [num_rows, size]: a block takes 32 columns, its warps every
// kFfnWarpsPerBlock-th row each.
template <typename In>
__global__ void __launch_bounds__(kFfnThreads)
    column_sum_kernel(const Compute<In>* partial, In* out, int64_t num_rows, int64_t size) {
  using T = Compute<In>;
  CALM_SHARED_ARRAY(T, sums, kFfnThreads);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  T sum = 0;
  if (column < size) {
    for (int64_t row = warp; row < num_rows; row += kFfnWarpsPerBlock) {
      sum += partial[row * size + column];
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= size) return;
  for (int other = 1; other < kFfnWarpsPerBlock; ++other) sum += sums[other * 32 + threadIdx.x];
  out[column] = narrow<In>(sum);
}

}  // namespace calm
