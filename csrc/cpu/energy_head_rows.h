// What a block of the energy head does between its matmuls, a few rows at a time: called from
// torch's pool. Rows are dense, `size` = H numbers; S is the dtype of the tensors, the arithmetic
// is in float (double for double). Row r belongs to position r / num_samples.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/lane_rows.h"

namespace calm {

// Where a step writes rows that a product reads: dense, or as the right operand of one in packed
// order (cpu/sgemm.h), which is then not packed again.
template <typename S>
struct RowTarget {
  S* data;
  int64_t size;
  // Of the packed order; zero for dense rows.
  int64_t first = 0;  // row that the step's row 0 is of the operand
  int64_t depth = 0;  // rows of the operand
  int64_t step = 0;

  S* row(int64_t r) const {
    if (step == 0) return data + r * size;
    const int64_t start = (first + r) / step * step;
    return data + start * num_panels() * kPanel + (first + r - start) * kPanel;
  }
  // Number i of a row is at row(r)[i / kPanel * panel_stride(r) + i % kPanel].
  int64_t panel_stride(int64_t r) const {
    if (step == 0) return kPanel;
    return std::min(step, depth - (first + r) / step * step) * kPanel;
  }

  static constexpr int64_t kPanel = 32;
  int64_t num_panels() const { return (size + kPanel - 1) / kPanel; }
};

// normed = (x - mean) * rstd * weight + bias with the row's own mean and rstd, which are kept.
template <typename S>
struct LayerNormRows {
  const S* x;
  const S* weight;
  const S* bias;
  RowTarget<S> normed;
  ComputeOf<S>* mean;
  ComputeOf<S>* rstd;
  int64_t num_rows;
  int64_t size;
  double eps;
};

// grad_x holds the gradient of normed and becomes that of x, with grad_out (the residual's) added
// unless it is null. The sums [size] are added to: gradients of weight and bias, and of a bias of
// the residual.
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
  RowTarget<S> activated;
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

// product = silu(gate) * up, of which grad is the gradient; grad_gate_up is written and added to
// grad_sum [2 size]. product may lie where grad does.
template <typename S>
struct GatedBackwardRows {
  const S* gate_up;
  const S* grad;
  RowTarget<S> product;
  S* grad_gate_up;
  ComputeOf<S>* grad_sum;
  int64_t num_rows;
  int64_t size;
};

// Of z = W noise + b whose mean over a row is zero, the norms e = z * rstd * weight + bias and, of
// that, (e - mean) * norm_rstd: the three factors of a row are kept. scaled = rstd * norm_rstd *
// noise, followed by rstd * norm_rstd and norm_rstd where `appends`. e is left out if null; it may
// lie where z does.
template <typename S>
struct NoiseRows {
  const S* z;
  const S* noise;
  const S* weight;
  const S* bias;
  S* e;
  RowTarget<S> scaled;
  bool appends;
  S* rstd;
  S* mean;
  S* norm_rstd;
  int64_t num_rows;
  int64_t size;
  int64_t noise_size;
  double eps;
};

// z becomes its gradient. What reads the two norms is scaled * A^T + rstd * norm_rstd * by_factor +
// norm_rstd * by_norm; grad_first is its gradient, grad_scaled that of scaled [num_rows,
// noise_size]. grad_out is the gradient of e as far as it is read elsewhere. The sums are added to:
// gradients of by_factor and by_norm, of weight and bias and of b, and the sum of grad_out.
template <typename S>
struct NoiseBackwardRows {
  S* z;
  const S* noise;
  const S* weight;
  const S* bias;
  const S* by_factor;
  const S* by_norm;
  const S* grad_first;
  const S* grad_scaled;
  const S* grad_out;
  const S* rstd;
  const S* mean;
  const S* norm_rstd;
  S* factor_sum;
  S* norm_sum;
  S* grad_weight;
  S* grad_bias;
  S* grad_z_sum;
  S* grad_out_sum;
  int64_t num_rows;
  int64_t size;
  int64_t noise_size;
};

// sum += the rows
template <typename S>
struct ColumnSumRows {
  const S* rows;
  ComputeOf<S>* sum;
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
template <typename S>
void run_rows(const ColumnSumRows<S>& rows);
// float and double alone.
template <typename S>
void run_rows(const NoiseRows<S>& rows);
template <typename S>
void run_rows(const NoiseBackwardRows<S>& rows);

}  // namespace calm
