// The first block of the energy head on CPUs from the noise on, float32 and float64: the linear
// layer and both norms in front of its MLP folded into one product (cpu/energy_head_fold.h), which
// is made once a call. The backward recomputes z.
//
// Work a row, forward and backward: 12 H E operations in place of the 6 H^2 + 4 H E of the linear
// layer and of what reads e, and no norm's rows in memory.

#include <optional>
#include <vector>

#include "cpu/energy_head_block.h"
#include "cpu/energy_head_fold.h"

namespace calm {
namespace {

using namespace energy_head;

// Noise [R, E] through the linear layer and both norms.
template <typename S>
class NoiseInput {
 public:
  static constexpr int64_t kNumSums = 5;

  NoiseInput(const Tensor& noise, const Embedding& embed, const Weights& weights, double eps,
             int64_t block, Workspace<Memory>& memory)
      : noise_(noise),
        embed_(embed),
        weights_(weights),
        eps_(eps),
        memory_(memory),
        folded_(embed, weights),
        of_noise_(transposed(folded_.of_noise()), noise.size(0), memory->of_noise) {
    statistics_ = memory.matrix_of<S>(memory->statistics, 3, block);
    rows_ = memory.matrix(memory->rows, noise, block, weights.size());
  }

  void start_forward() {
    scaled_ = memory_.matrix(memory_->narrow_rows, noise_, rows_.size(0), noise_.size(1) + 2);
    of_scaled_.emplace(transposed(folded_.product), noise_.size(0), memory_->of_sample);
  }
  const Tensor& first_bias() const { return folded_.first_bias; }
  const S* residual(int64_t row) const { return row_of<S>(rows_, row - start_); }

  void multiply_first(Tensor& first_in, Tensor&, int64_t start, int64_t count) {
    start_ = start;
    embed(start, count);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      const RowTarget<S> scaled{row_of<S>(scaled_, first), scaled_.size(1)};
      run_rows<S>(noise_rows(first, n, row_of<S>(rows_, first), scaled, true));
    });
    multiply(first_in, rows(scaled_, 0, count), *of_scaled_, memory_->left);
  }

  void start_backward(const Tensor& grad_out, bool packs, Embedding& grad_embed,
                      Weights& gradients) {
    const int64_t size = rows_.size(1);
    const int64_t noise_size = noise_.size(1);
    scaled_ = memory_.matrix(memory_->narrow_rows, noise_, rows_.size(0), noise_size);
    grad_scaled_ = memory_.matrix(memory_->narrow_grads, noise_, rows_.size(0), noise_size);
    of_scaled_.emplace(folded_.of_scaled(), noise_.size(0), memory_->of_sample);
    grad_out_ = grad_out;
    grad_embed_ = &grad_embed;
    gradients_ = &gradients;
    grad_product_ = torch::stable::new_empty(noise_, {size, noise_size + 2});
    grad_embedding_ = torch::stable::new_empty(noise_, {size, noise_size + 1});
    Tensor upper = memory_.matrix(memory_->input_upper, noise_, packs ? 2 * size : 0, noise_size);
    upper_product_ = rows(upper, 0, packs ? size : 0);
    upper_embedding_ = rows(upper, packs ? size : 0, packs ? size : 0);
  }

  void backward(RowSums<S>& sums, Tensor& grad_first, int64_t start, int64_t count) {
    if (!sums.weight_grads()) return;
    start_ = start;
    embed(start, count);
    sums.prepare(count, noise_.size(1));
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(noise_rows(first, n, nullptr, sums.target(scaled_, first), false));
    });
    const Tensor some_first = rows(grad_first, 0, count);
    sums.accumulate(of_noise(grad_product_), upper_product_, start == 0, some_first,
                    rows(scaled_, 0, count));
    multiply(rows(grad_scaled_, 0, count), some_first, *of_scaled_, memory_->left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(NoiseBackwardRows<S>{row_of<S>(rows_, first),
                                       row_of<S>(noise_, start + first),
                                       embed_.norm.const_data_ptr<S>(),
                                       embed_.norm_bias.const_data_ptr<S>(),
                                       folded_.by_factor.template const_data_ptr<S>(),
                                       folded_.by_norm.template const_data_ptr<S>(),
                                       row_of<S>(std::as_const(grad_first), first),
                                       row_of<S>(std::as_const(grad_scaled_), first),
                                       row_of<S>(grad_out_, start + first),
                                       statistic(0) + first,
                                       statistic(1) + first,
                                       statistic(2) + first,
                                       sums.of_task(first, kFactor),
                                       sums.of_task(first, kNormFactor),
                                       sums.of_task(first, kNorm),
                                       sums.of_task(first, kNormBias),
                                       sums.of_task(first, kEmbedBias),
                                       sums.of_task(first, kDownBias),
                                       n,
                                       rows_.size(1),
                                       noise_.size(1)});
    });
    sums.accumulate_rows(of_noise(grad_embedding_), upper_embedding_, start == 0,
                         rows(rows_, 0, count), rows(noise_, start, count));
  }

  // From the gradients of what the weights became to theirs.
  void finish(const RowSums<S>& sums) {
    if (!sums.weight_grads()) return;
    const int64_t size = rows_.size(1);
    const int64_t noise_size = noise_.size(1);
    if (sums.packs()) {
      add_onto(of_noise(grad_product_), upper_product_);
      add_onto(of_noise(grad_embedding_), upper_embedding_);
    }
    const Rows<S> product_rows = writable<S>(grad_product_);
    const Rows<S> embedding_rows = writable<S>(grad_embedding_);
    const std::vector<S> by_factor = sums.finished(kFactor, size);
    const std::vector<S> by_norm = sums.finished(kNormFactor, size);
    const std::vector<S> of_bias = sums.finished(kEmbedBias, size);
    for (int64_t i = 0; i < size; ++i) {
      product_rows[i][noise_size] = by_factor[i];
      product_rows[i][noise_size + 1] = by_norm[i];
      embedding_rows[i][noise_size] = of_bias[i];
    }
    sums.finish(grad_embed_->norm, kNorm);
    sums.finish(grad_embed_->norm_bias, kNormBias);

    folded_.backward(embed_, weights_, grad_product_, grad_embedding_, *grad_embed_, *gradients_);
  }

 private:
  enum : int64_t { kFactor = kInputSums, kNormFactor, kNorm, kNormBias, kEmbedBias };

  Tensor of_noise(const Tensor& matrix) const { return columns(matrix, 0, noise_.size(1)); }

  S* statistic(int64_t which) { return row_of<S>(statistics_, which); }

  // rows_ = z of the rows from `start` on
  void embed(int64_t start, int64_t count) {
    multiply_onto_row(rows(rows_, 0, count), folded_.embedding_bias, rows(noise_, start, count),
                      of_noise_, memory_->left);
  }

  NoiseRows<S> noise_rows(int64_t first, int64_t n, S* e, const RowTarget<S>& scaled,
                          bool appends) {
    return {row_of<S>(std::as_const(rows_), first),
            row_of<S>(noise_, start_ + first),
            embed_.norm.const_data_ptr<S>(),
            embed_.norm_bias.const_data_ptr<S>(),
            e,
            scaled,
            appends,
            statistic(0) + first,
            statistic(1) + first,
            statistic(2) + first,
            n,
            rows_.size(1),
            noise_.size(1),
            eps_};
  }

  const Tensor& noise_;
  const Embedding& embed_;
  const Weights& weights_;
  double eps_;
  Workspace<Memory>& memory_;
  Folded<S> folded_;
  RightOperand of_noise_;
  std::optional<RightOperand> of_scaled_;
  Tensor statistics_;  // factor of the first norm, mean of e, factor of the second, [3, block]
  Tensor rows_;        // z, in the forward e, then z's gradient
  Tensor scaled_;
  Tensor grad_scaled_;
  int64_t start_ = 0;
  Tensor grad_out_;
  Embedding* grad_embed_ = nullptr;
  Weights* gradients_ = nullptr;
  Tensor grad_product_;    // [H, E + 2]
  Tensor grad_embedding_;  // [H, E + 1]
  Tensor upper_product_;
  Tensor upper_embedding_;
};

Embedding embedding_of(const std::vector<Tensor>& tensors) {
  return {dense(tensors[0]), dense(tensors[1]), dense(tensors[2]), dense(tensors[3])};
}

Weights weights_of(const std::vector<Tensor>& tensors) {
  const Tensor* const t = tensors.data() + kNumEmbeddingWeights;
  return {dense(t[0]), dense(t[1]), dense(t[2]), dense(t[3]), t[4],
          dense(t[5]), t[6],        dense(t[7]), t[8],        dense(t[9])};
}

// function.template operator()<T>() for float or double.
template <typename Function>
void dispatch_compute(const Tensor& like, const Function& function) {
  if (like.scalar_type() == ScalarType::Double) return function.template operator()<double>();
  STD_TORCH_CHECK(like.scalar_type() == ScalarType::Float, "expected float32 or float64");
  function.template operator()<float>();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> energy_head_first_block(const Tensor& noise_in,
                                                                   const Tensor& condition_in,
                                                                   std::vector<Tensor> tensors,
                                                                   double eps,
                                                                   bool save_activations) {
  const Tensor noise = dense(noise_in);
  const Tensor condition = dense(condition_in);
  const Embedding embedding = embedding_of(tensors);
  const Weights weights = weights_of(tensors);
  const int64_t num_rows = noise.size(0);
  const int64_t size = weights.size();
  Tensor out = pooled_empty(noise, {num_rows, size});
  Kept kept(noise, save_activations ? num_rows : 0, size);
  if (num_rows != 0) {
    dispatch_compute(noise, [&]<typename S>() {
      const int64_t block = block_rows(num_rows, num_rows / condition.size(0));
      Workspace<Memory> memory;
      NoiseInput<S> input(noise, embedding, weights, eps, block, memory);
      input.start_forward();
      forward<S>(input, condition, weights, memory, out, kept);
    });
  }
  return {out, kept.first, kept.second, kept.gate_up};
}

// Gradients of the condition and of the weights.
std::tuple<Tensor, std::vector<Tensor>> energy_head_first_block_backward(
    const Tensor& grad_out_in, const Tensor& noise_in, const Tensor& condition_in,
    std::vector<Tensor> tensors, const Tensor& first, const Tensor& second, const Tensor& gate_up,
    double eps, bool weight_grads) {
  const Tensor grad_out = dense(grad_out_in);
  const Tensor noise = dense(noise_in);
  const Tensor condition = dense(condition_in);
  const Embedding embedding = embedding_of(tensors);
  const Weights weights = weights_of(tensors);
  const Kept kept(first, second, gate_up);
  const int64_t num_rows = noise.size(0);
  const auto fresh = [&](const Tensor& like) {
    return num_rows == 0 ? torch::stable::new_zeros(like, like.sizes())
                         : torch::stable::new_empty(like, like.sizes());
  };
  Tensor grad_condition = fresh(condition);
  std::vector<Tensor> gradients;
  for (const Tensor& tensor : tensors) {
    gradients.push_back(weight_grads ? fresh(tensor) : torch::stable::new_empty(tensor, {0}));
  }
  if (num_rows != 0) {
    dispatch_compute(noise, [&]<typename S>() {
      const int64_t size = weights.size();
      const int64_t block = block_rows(num_rows, num_rows / condition.size(0));
      Embedding grad_embedding = embedding_of(gradients);
      Weights grad_weights = weights_of(gradients);
      Workspace<Memory> memory;
      const Tensor like = memory.matrix(memory->operand, noise, block, size);
      RowSums<S> sums(memory, like, kInputSums + NoiseInput<S>::kNumSums, size, size, weight_grads);
      NoiseInput<S> input(noise, embedding, weights, eps, block, memory);
      input.start_backward(grad_out, sums.packs(), grad_embedding, grad_weights);
      backward<S>(input, grad_out, condition, weights, memory, kept, sums, block, grad_condition,
                  grad_weights);
      input.finish(sums);
    });
  }
  return {grad_condition, gradients};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("energy_head_first_block", TORCH_BOX(&calm::energy_head_first_block));
  m.impl("energy_head_first_block_backward", TORCH_BOX(&calm::energy_head_first_block_backward));
}
