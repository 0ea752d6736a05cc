// What the gated feed-forward block does between its matmuls, a few rows at a time: called from
// torch's pool. S is the dtype of the tensors; the arithmetic is in float (double for double).
#pragma once

#include <cstdint>

#include "cpu/lane_rows.h"

namespace calm {

// rstd[r] = (mean(x[r]^2) + eps)^(-1/2), normed = x * rstd * norm_weight; [num_rows, size] dense.
template <typename S>
struct RmsNormRows {
  const S* x;
  const S* norm_weight;
  S* normed;
  ComputeOf<S>* rstd;
  int64_t num_rows;
  int64_t size;
  double eps;
};

// normed from an rstd that is known.
template <typename S>
struct RmsNormAgainRows {
  const S* x;
  const S* norm_weight;
  const ComputeOf<S>* rstd;
  S* normed;
  int64_t num_rows;
  int64_t size;
};

// grad_x from the gradient of normed, which may lie in the same place, with that of a residual
// added where there is one; grad_norm_weight [size] is added to.
template <typename S>
struct RmsNormBackwardRows {
  const S* x;
  const S* norm_weight;
  const ComputeOf<S>* rstd;
  const S* grad_normed;
  const S* grad_residual;  // or nullptr
  S* grad_x;
  ComputeOf<S>* grad_norm_weight;
  int64_t num_rows;
  int64_t size;
};

// product = silu(gate) * up; gate_up [num_rows, 2 size] holds gate beside up.
template <typename S>
struct SwigluRows {
  const S* gate_up;
  S* product;
  int64_t num_rows;
  int64_t size;
};

// product holds its own gradient and becomes silu(gate) * up; grad_gate_up is written.
template <typename S>
struct SwigluBackwardRows {
  const S* gate_up;
  S* product;
  S* grad_gate_up;
  int64_t num_rows;
  int64_t size;
};

template <typename S>
void rms_norm(const RmsNormRows<S>& rows);
template <typename S>
void rms_norm_again(const RmsNormAgainRows<S>& rows);
template <typename S>
void rms_norm_backward(const RmsNormBackwardRows<S>& rows);
template <typename S>
void swiglu(const SwigluRows<S>& rows);
template <typename S>
void swiglu_backward(const SwigluBackwardRows<S>& rows);

}  // namespace calm
