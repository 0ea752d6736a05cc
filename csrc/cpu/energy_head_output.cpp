// The last layers of the energy head on CPUs: latents = W2 silu(W1 LayerNorm(e) + b1) + b2.
//
// Rows go through in blocks, as those of energy_head_block.h. The forward keeps what silu reads.
//
// Work: 6 H (H + D) operations a row, forward and backward. Fewest bytes: e and weights read,
// latents and gradients written, and H kept numbers a row written and read once.

#include <utility>

#include "cpu/energy_head_block.h"

namespace calm {
namespace {

using namespace energy_head;

struct Output {
  Tensor norm;
  Tensor norm_bias;
  Tensor hidden;  // [H, H]
  Tensor hidden_bias;
  Tensor latent;  // [D, H]
  Tensor latent_bias;
};

enum OutputSum : int64_t { kNorm, kNormBias, kHiddenBias, kLatentBias, kOutputSums };

// LayerNorm of some rows of e.
template <typename S>
class Norm {
 public:
  Norm(const Tensor& e, const Output& weights, double eps, int64_t block, Workspace<Memory>& memory)
      : e_(e),
        weights_(weights),
        eps_(eps),
        statistics_(memory.matrix_of<ComputeOf<S>>(memory->statistics, 2, block)) {}

  const ComputeOf<S>* mean(int64_t row) { return row_of<ComputeOf<S>>(statistics_, 0) + row; }
  const ComputeOf<S>* rstd(int64_t row) { return row_of<ComputeOf<S>>(statistics_, 1) + row; }

  // Row `first` of the block that begins at `start`, and n - 1 more.
  void run(int64_t start, int64_t first, int64_t n, const RowTarget<S>& normed) {
    run_rows<S>(LayerNormRows<S>{row_of<S>(e_, start + first), weights_.norm.const_data_ptr<S>(),
                                 weights_.norm_bias.const_data_ptr<S>(), normed,
                                 row_of<ComputeOf<S>>(statistics_, 0) + first,
                                 row_of<ComputeOf<S>>(statistics_, 1) + first, n, e_.size(1),
                                 eps_});
  }

 private:
  const Tensor& e_;
  const Output& weights_;
  double eps_;
  Tensor statistics_;
};

template <typename S>
void forward(const Tensor& e, const Output& weights, double eps, Tensor& latents, Tensor& kept) {
  const int64_t num_rows = e.size(0);
  const int64_t size = e.size(1);
  const bool keeps = kept.size(0) == num_rows;
  const int64_t block = block_rows(num_rows, 1);
  Workspace<Memory> memory;
  Norm<S> norm(e, weights, eps, block, memory);
  Tensor operand = memory.matrix(memory->operand, e, block, size);
  Tensor passing = memory.matrix(memory->first, e, keeps ? 0 : block, size);
  const RightOperand hidden(transposed(weights.hidden), num_rows, memory->mid);
  const RightOperand latent(transposed(weights.latent), num_rows, memory->out);
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t count = std::min(block, num_rows - start);
    const Tensor read = rows(operand, 0, count);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      norm.run(start, first, n, {row_of<S>(operand, first), size});
    });
    Tensor silu_in = keeps ? rows(kept, start, count) : rows(passing, 0, count);
    multiply_onto_row(silu_in, weights.hidden_bias, read, hidden, memory->left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(SiluRows<S>{row_of<S>(silu_in, first), nullptr, row_of<S>(operand, first), 0, n,
                              1, size});
    });
    multiply_onto_row(rows(latents, start, count), weights.latent_bias, read, latent, memory->left);
  }
}

template <typename S>
void backward(const Tensor& grad_latents, const Tensor& e, const Output& weights,
              const Tensor& kept, double eps, bool weight_grads, Tensor& grad_e,
              Output& gradients) {
  const int64_t num_rows = e.size(0);
  const int64_t size = e.size(1);
  const int64_t latent_size = weights.latent.size(0);
  const int64_t block = backward_rows<S>(num_rows, 1, weight_grads);
  Workspace<Memory> memory;
  Norm<S> norm(e, weights, eps, block, memory);
  Tensor product = memory.matrix(memory->product, e, block, size);
  Tensor grad_hidden = memory.matrix(memory->first, e, block, size);
  RowSums<S> sums(memory, product, kOutputSums, std::max(size, latent_size),
                  std::min(size, latent_size), weight_grads);
  const int64_t part = sums.packs() ? size : 0;
  const int64_t latent_part = sums.packs() ? latent_size : 0;
  Tensor upper = memory.matrix(memory->upper, e, part + latent_part, size);
  Tensor upper_hidden = rows(upper, 0, part);
  Tensor upper_latent = rows(upper, part, latent_part);
  const RightOperand hidden(weights.hidden, num_rows, memory->mid);
  const RightOperand latent(weights.latent, num_rows, memory->out);
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t count = std::min(block, num_rows - start);
    const bool starts = start == 0;
    const Tensor some_grad = rows(grad_latents, start, count);
    const Tensor some_hidden = rows(grad_hidden, 0, count);
    const Tensor some_product = rows(product, 0, count);
    multiply(some_hidden, some_grad, latent, memory->left);
    sums.prepare(count, size);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(SiluBackwardRows<S>{row_of<S>(kept, start + first), row_of<S>(grad_hidden, first),
                                      sums.target(product, first), sums.of_task(first, kHiddenBias),
                                      n, size});
      run_rows<S>(ColumnSumRows<S>{row_of<S>(grad_latents, start + first),
                                   sums.of_task(first, kLatentBias), n, latent_size});
    });
    sums.accumulate(gradients.latent, upper_latent, starts, some_grad, some_product);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      norm.run(start, first, n, sums.target(product, first));
    });
    sums.accumulate(gradients.hidden, upper_hidden, starts, some_hidden, some_product);
    multiply(rows(grad_e, start, count), some_hidden, hidden, memory->left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(LayerNormBackwardRows<S>{
          row_of<S>(e, start + first), weights.norm.const_data_ptr<S>(), norm.mean(first),
          norm.rstd(first), nullptr, row_of<S>(grad_e, start + first), sums.of_task(first, kNorm),
          sums.of_task(first, kNormBias), nullptr, n, size});
    });
  }
  if (!weight_grads) return;
  if (sums.packs()) {
    add_onto(gradients.hidden, upper_hidden);
    add_onto(gradients.latent, upper_latent);
  }
  sums.finish(gradients.norm, kNorm);
  sums.finish(gradients.norm_bias, kNormBias);
  sums.finish(gradients.hidden_bias, kHiddenBias);
  sums.finish(gradients.latent_bias, kLatentBias);
}

std::tuple<Tensor, Tensor> energy_head_output(const Tensor& e_in, const Tensor& norm_weight,
                                              const Tensor& norm_bias, const Tensor& hidden_weight,
                                              const Tensor& hidden_bias,
                                              const Tensor& latent_weight,
                                              const Tensor& latent_bias, double eps,
                                              bool save_activations) {
  const Tensor e = dense(e_in);
  const Output weights{dense(norm_weight), dense(norm_bias), hidden_weight,
                       dense(hidden_bias), latent_weight,    dense(latent_bias)};
  const int64_t num_rows = e.size(0);
  Tensor latents = pooled_empty(e, {num_rows, latent_weight.size(0)});
  Tensor kept = pooled_empty(e, {save_activations ? num_rows : 0, e.size(1)});
  if (num_rows != 0) {
    dispatch_floating(e.scalar_type(),
                      [&]<typename S>() { forward<S>(e, weights, eps, latents, kept); });
  }
  return {latents, kept};
}

// Gradients of e and the six weights in order.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> energy_head_output_backward(
    const Tensor& grad_latents_in, const Tensor& e_in, const Tensor& norm_weight,
    const Tensor& norm_bias, const Tensor& hidden_weight, const Tensor& hidden_bias,
    const Tensor& latent_weight, const Tensor& latent_bias, const Tensor& kept_in, double eps,
    bool weight_grads) {
  const Tensor grad_latents = dense(grad_latents_in);
  const Tensor e = dense(e_in);
  const Tensor kept = dense(kept_in);
  const Output weights{dense(norm_weight), dense(norm_bias), hidden_weight,
                       dense(hidden_bias), latent_weight,    dense(latent_bias)};
  const int64_t num_rows = e.size(0);
  const auto gradient = [&](const Tensor& like) {
    if (!weight_grads) return torch::stable::new_empty(e, {0});
    return num_rows == 0 ? torch::stable::new_zeros(like, like.sizes())
                         : torch::stable::new_empty(like, like.sizes());
  };
  Tensor grad_e = pooled_empty(e, {num_rows, e.size(1)});
  Output gradients{gradient(norm_weight), gradient(norm_bias),     gradient(hidden_weight),
                   gradient(hidden_bias), gradient(latent_weight), gradient(latent_bias)};
  if (num_rows != 0) {
    dispatch_floating(e.scalar_type(), [&]<typename S>() {
      backward<S>(grad_latents, e, weights, kept, eps, weight_grads, grad_e, gradients);
    });
  }
  return {grad_e,
          gradients.norm,
          gradients.norm_bias,
          gradients.hidden,
          gradients.hidden_bias,
          gradients.latent,
          gradients.latent_bias};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("energy_head_output", TORCH_BOX(&calm::energy_head_output));
  m.impl("energy_head_output_backward", TORCH_BOX(&calm::energy_head_output_backward));
}
