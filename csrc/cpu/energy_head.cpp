// A block of the energy head on CPUs, forward and backward, from its input rows on.
//
// Work: 30 H^2 operations a row and 6 H^2 a position, forward and backward (36 H^2 a row without
// sharing). Fewest bytes: e, grad_out and weights read, out and gradients written, and what the
// forward keeps for the backward, 4 H numbers a row, written and read once.

#include <optional>

#include "cpu/energy_head_block.h"

namespace calm {
namespace {

using namespace energy_head;

// LayerNorm of rows e.
template <typename S>
class NormedInput {
 public:
  static constexpr int64_t kNumSums = 2;

  NormedInput(const Tensor& e, const Weights& weights, double eps, int64_t block,
              Workspace<Memory>& memory)
      : e_(e), weights_(weights), eps_(eps), memory_(memory) {
    statistics_ = memory.matrix_of<T>(memory->statistics, 2, block);
    mean_ = row_of<T>(statistics_, 0);
    rstd_ = row_of<T>(statistics_, 1);
  }

  void start_forward() {
    of_sample_.emplace(transposed(weights_.of_sample()), e_.size(0), memory_->of_sample);
  }
  const Tensor& first_bias() const { return weights_.in_bias; }
  const S* residual(int64_t row) const { return row_of<S>(e_, row); }

  void multiply_first(Tensor& first_in, Tensor& operand, int64_t start, int64_t count) {
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      normalize(start, first, n, {row_of<S>(operand, first), operand.size(1)});
    });
    multiply(first_in, rows(operand, 0, count), *of_sample_, memory_->left);
  }

  void start_backward(const Tensor& grad_out, bool packs, int64_t block, Tensor& grad_e,
                      Weights& gradients) {
    of_sample_.emplace(weights_.of_sample(), e_.size(0), memory_->of_sample);
    grad_out_ = grad_out;
    grad_e_ = grad_e;
    gradients_ = &gradients;
    normed_ = memory_.matrix(memory_->rows, e_, block, e_.size(1));
    upper_ = memory_.matrix(memory_->input_upper, e_, packs ? e_.size(1) : 0, e_.size(1));
  }

  void backward(RowSums<S>& sums, Tensor& grad_first, int64_t start, int64_t count) {
    const int64_t size = e_.size(1);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      normalize(start, first, n, sums.target(normed_, first));
    });
    const Tensor some_first = rows(grad_first, 0, count);
    if (sums.weight_grads()) {
      sums.accumulate(gradients_->of_sample(), upper_, start == 0, some_first,
                      rows(normed_, 0, count));
    }
    multiply(rows(grad_e_, start, count), some_first, *of_sample_, memory_->left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(LayerNormBackwardRows<S>{
          row_of<S>(e_, start + first), weights_.norm.const_data_ptr<S>(), mean_ + first,
          rstd_ + first, row_of<S>(grad_out_, start + first), row_of<S>(grad_e_, start + first),
          sums.of_task(first, kNorm), sums.of_task(first, kNormBias),
          sums.of_task(first, kDownBias), n, size});
    });
  }

  void finish(const RowSums<S>& sums) {
    if (!sums.weight_grads()) return;
    if (sums.packs()) add_onto(gradients_->of_sample(), upper_);
    sums.finish(gradients_->norm, kNorm);
    sums.finish(gradients_->norm_bias, kNormBias);
  }

 private:
  using T = ComputeOf<S>;
  enum : int64_t { kNorm = kInputSums, kNormBias };

  void normalize(int64_t start, int64_t first, int64_t n, const RowTarget<S>& normed) {
    run_rows<S>(LayerNormRows<S>{row_of<S>(e_, start + first), weights_.norm.const_data_ptr<S>(),
                                 weights_.norm_bias.const_data_ptr<S>(), normed, mean_ + first,
                                 rstd_ + first, n, e_.size(1), eps_});
  }

  const Tensor& e_;
  const Weights& weights_;
  double eps_;
  Workspace<Memory>& memory_;
  Tensor statistics_;
  T* mean_;
  T* rstd_;
  std::optional<RightOperand> of_sample_;
  Tensor grad_out_;
  Tensor grad_e_;
  Weights* gradients_ = nullptr;
  Tensor normed_;
  Tensor upper_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor> energy_head_block(
    const Tensor& e_in, const Tensor& condition_in, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& in_weight, const Tensor& in_bias,
    const Tensor& mid_weight, const Tensor& mid_bias, const Tensor& out_weight,
    const Tensor& out_bias, const Tensor& down_weight, const Tensor& down_bias, double eps,
    bool save_activations) {
  const Tensor e = dense(e_in);
  const Tensor condition = dense(condition_in);
  const Weights weights{dense(norm_weight), dense(norm_bias), in_weight,  dense(in_bias),
                        mid_weight,         dense(mid_bias),  out_weight, dense(out_bias),
                        down_weight,        dense(down_bias)};
  const int64_t num_rows = e.size(0);
  const int64_t size = weights.size();
  const int64_t kept_rows = save_activations ? num_rows : 0;
  Tensor out = pooled_empty(e, {num_rows, size});
  Kept kept(e, kept_rows, size);
  if (num_rows != 0) {
    const int64_t num_samples = num_rows / condition.size(0);
    dispatch_floating(e.scalar_type(), [&]<typename S>() {
      Workspace<Memory> memory;
      NormedInput<S> input(e, weights, eps, block_rows(num_rows, num_samples), memory);
      input.start_forward();
      forward<S>(input, condition, weights, memory, out, kept);
    });
  }
  return {out, kept.first, kept.second, kept.gate_up};
}

// Gradients of e, condition and the ten weights in order.
using BlockGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                  Tensor, Tensor, Tensor, Tensor>;

BlockGradients energy_head_block_backward(const Tensor& grad_out_in, const Tensor& e_in,
                                          const Tensor& condition_in, const Tensor& norm_weight,
                                          const Tensor& norm_bias, const Tensor& in_weight,
                                          const Tensor& in_bias, const Tensor& mid_weight,
                                          const Tensor& mid_bias, const Tensor& out_weight,
                                          const Tensor& out_bias, const Tensor& down_weight,
                                          const Tensor& down_bias, const Tensor& first,
                                          const Tensor& second, const Tensor& gate_up, double eps,
                                          bool weight_grads) {
  const Tensor grad_out = dense(grad_out_in);
  const Tensor e = dense(e_in);
  const Tensor condition = dense(condition_in);
  const Kept kept(first, second, gate_up);
  const Weights weights{dense(norm_weight), dense(norm_bias), in_weight,  dense(in_bias),
                        mid_weight,         dense(mid_bias),  out_weight, dense(out_bias),
                        down_weight,        dense(down_bias)};
  const int64_t num_rows = e.size(0);
  const int64_t size = weights.size();
  const auto gradient = [&](std::initializer_list<int64_t> shape) {
    if (!weight_grads) return torch::stable::new_empty(e, {0});
    return num_rows == 0 ? torch::stable::new_zeros(e, shape) : torch::stable::new_empty(e, shape);
  };
  const auto positions = {condition.size(0), size};
  Tensor grad_e = pooled_empty(e, {num_rows, size});
  Tensor grad_condition = num_rows == 0 ? torch::stable::new_zeros(e, positions)
                                        : torch::stable::new_empty(e, positions);
  Weights w{
      gradient({size}),       gradient({size}), gradient({size, 2 * size}), gradient({size}),
      gradient({size, size}), gradient({size}), gradient({2 * size, size}), gradient({2 * size}),
      gradient({size, size}), gradient({size})};
  if (num_rows != 0) {
    const int64_t num_samples = num_rows / condition.size(0);
    dispatch_floating(e.scalar_type(), [&]<typename S>() {
      Workspace<Memory> memory;
      const int64_t block = backward_rows<S>(num_rows, num_samples, weight_grads);
      const Tensor like = memory.matrix(memory->operand, e, block, size);
      RowSums<S> sums(memory, like, kInputSums + NormedInput<S>::kNumSums, size, size,
                      weight_grads);
      NormedInput<S> input(e, weights, eps, block, memory);
      input.start_backward(grad_out, sums.packs(), block, grad_e, w);
      backward<S>(input, grad_out, condition, weights, memory, kept, sums, block, grad_condition,
                  w);
      input.finish(sums);
    });
  }
  return {grad_e, grad_condition, w.norm, w.norm_bias, w.in,   w.in_bias,
          w.mid,  w.mid_bias,     w.out,  w.out_bias,  w.down, w.down_bias};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("energy_head_block", TORCH_BOX(&calm::energy_head_block));
  m.impl("energy_head_block_backward", TORCH_BOX(&calm::energy_head_block_backward));
}
