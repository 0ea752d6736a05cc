// What a block of the energy head does between its matmuls, a few rows at a time: called from
// torch's pool. Rows are dense, `size` = H numbers; S is the dtype of the tensors, the arithmetic
// is in float (double for double). Row r belongs to position r / num_samples.
#pragma once

#include <cstdint>

#include "cpu/lane_rows.h"

namespace calm {

// normed = (x - mean) * rstd * weight + bias with the row's own mean and rstd, which are kept.
template <typename S>
struct LayerNormRows {
  const S* x;
  const S* weight;
  const S* bias;
  S* normed;
  ComputeOf<S>* mean;
  ComputeOf<S>* rstd;
  int64_t num_rows;
  int64_t size;
  double eps;
};

// grad_x holds the gradient of normed and becomes that of x, with grad_out (the residual's) added.
// The sums [size] are added to: gradients of weight and bias, and of a bias of the residual.
template <typename S>
struct LayerNormBackwardRows {
  const S* x;
  const S* weight;
  const ComputeOf<S>* mean;
  const ComputeOf<S>* rstd;
  const S* grad_out;
  S* grad_x;
  ComputeOf<S>* grad_weight;
  ComputeOf<S>* grad_bias;
  ComputeOf<S>* grad_out_sum;
  int64_t num_rows;
  int64_t size;
};

// x += shared[position] where shared is given; activated = silu(x).
template <typename S>
struct SiluRows {
  S* x;
  const S* shared;
  S* activated;
  int64_t first_row;
  int64_t num_rows;
  int64_t num_samples;
  int64_t size;
};

// grad holds the gradient of silu(x) and becomes that of x, which is added to grad_sum [size];
// activated = silu(x).
template <typename S>
struct SiluBackwardRows {
  const S* x;
  S* grad;
  S* activated;
  ComputeOf<S>* grad_sum;
  int64_t num_rows;
  int64_t size;
};

// product = silu(gate) * up, gate_up [num_rows, 2 size] holds gate beside up; out = x + bias.
template <typename S>
struct GatedRows {
  const S* gate_up;
  S* product;
  const S* x;
  const S* bias;
  S* out;
  int64_t num_rows;
  int64_t size;
};

// product holds its own gradient and becomes silu(gate) * up; grad_gate_up is written and added to
// grad_sum [2 size].
template <typename S>
struct GatedBackwardRows {
  const S* gate_up;
  S* product;
  S* grad_gate_up;
  ComputeOf<S>* grad_sum;
  int64_t num_rows;
  int64_t size;
};

// sum[p] = sum over the samples of position p of rows [num_positions * num_samples, size].
template <typename S>
struct SampleSumRows {
  const S* rows;
  S* sum;
  int64_t num_positions;
  int64_t num_samples;
  int64_t size;
};

template <typename S>
void run_rows(const LayerNormRows<S>& rows);
template <typename S>
void run_rows(const LayerNormBackwardRows<S>& rows);
template <typename S>
void run_rows(const SiluRows<S>& rows);
template <typename S>
void run_rows(const SiluBackwardRows<S>& rows);
template <typename S>
void run_rows(const GatedRows<S>& rows);
template <typename S>
void run_rows(const GatedBackwardRows<S>& rows);
template <typename S>
void run_rows(const SampleSumRows<S>& rows);

}  // namespace calm
