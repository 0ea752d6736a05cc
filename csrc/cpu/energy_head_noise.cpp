// The first block of the energy head on CPUs from the noise on, float32 and float64.
//
// In front of the block's MLP stand a linear layer and two norms of its result: e = LayerNorm(W u +
// b) and LayerNorm(e). A norm subtracts a mean, which is linear, and divides by a number a row. So
// with r and s the factors of the two norms in a row, and Wc, bc less their means over columns,
//   e = r (g * z) + h,    z = Wc u + bc,    s (e - mean e) * g' + h'  read by the first layer's A:
//   first = r s (B u + b') + s b'' + A h',    B = A g' C g Wc,  b' = A g' C g bc,  b'' = A g' C h
// where C subtracts means and g, h, g', h' are the norms' weights and biases. A product with E + 2
// inputs a row takes the place of one with H; B is made once a call. The backward recomputes z.
//
// Work a row, forward and backward: 12 H E less than 6 H^2 of a block that reads e, and no norm of
// rows in memory.

#include <optional>
#include <vector>

#include "cpu/energy_head_block.h"

namespace calm {
namespace {

using namespace energy_head;

struct Embedding {
  Tensor weight;  // [H, E]
  Tensor bias;
  Tensor norm;
  Tensor norm_bias;
};
constexpr int kNumEmbeddingWeights = 4;

// Rows of a dense matrix, its pointer asked for once.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;

  T* operator[](int64_t row) const { return data + row * stride; }
};

template <typename T>
Rows<T> writable(Tensor& matrix) {
  return {matrix.mutable_data_ptr<T>(), matrix.size(1)};
}

template <typename T>
Rows<const T> readable(const Tensor& matrix) {
  return {matrix.const_data_ptr<T>(), matrix.size(1)};
}

// In float64, eight sums at a time.
template <typename T>
double dot(const T* a, const T* b, int64_t size) {
  constexpr int64_t kLanes = 8;
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += double(a[i + j]) * double(b[i + j]);
  }
  for (; i < size; ++i) sums[0] += double(a[i]) * double(b[i]);
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// matrix [rows, columns] less the means of its columns.
template <typename T>
void centre(T* matrix, int64_t num_rows, int64_t num_columns) {
  std::vector<double> mean(static_cast<size_t>(num_columns));
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t j = 0; j < num_columns; ++j) mean[j] += matrix[i * num_columns + j];
  }
  for (double& value : mean) value /= static_cast<double>(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    for (int64_t j = 0; j < num_columns; ++j) {
      matrix[i * num_columns + j] -= static_cast<T>(mean[j]);
    }
  }
}

// What the weights become.
template <typename T>
struct Folded {
  Tensor embedding;       // [H, E + 1]: Wc and bc
  Tensor embedding_bias;  // bc
  Tensor inner;           // [H, E + 2]: C g Wc, C g bc, C h
  Tensor sample;          // [H, H]: A g'
  Tensor product;         // [H, E + 2]: B, b', b''
  Tensor by_factor;       // b'
  Tensor by_norm;         // b''
  Tensor first_bias;      // the first layer's and A h'

  Folded(const Embedding& embed, const Weights& weights)
      : embedding(torch::stable::new_empty(embed.weight, {size(embed), noise_size(embed) + 1})),
        embedding_bias(torch::stable::new_empty(embed.weight, {size(embed)})),
        inner(torch::stable::new_empty(embed.weight, {size(embed), noise_size(embed) + 2})),
        sample(torch::stable::new_empty(embed.weight, {size(embed), size(embed)})),
        product(torch::stable::new_empty(embed.weight, {size(embed), noise_size(embed) + 2})),
        by_factor(torch::stable::new_empty(embed.weight, {size(embed)})),
        by_norm(torch::stable::new_empty(embed.weight, {size(embed)})),
        first_bias(torch::stable::new_empty(embed.weight, {size(embed)})) {
    const int64_t h = size(embed);
    const int64_t e = noise_size(embed);
    const T* const weight = embed.weight.template const_data_ptr<T>();
    const T* const bias = embed.bias.template const_data_ptr<T>();
    const Rows<T> embedding_rows = writable<T>(embedding);
    for (int64_t i = 0; i < h; ++i) {
      std::copy_n(weight + i * e, e, embedding_rows[i]);
      embedding_rows[i][e] = bias[i];
    }
    centre(embedding_rows[0], h, e + 1);
    const T* const norm = embed.norm.template const_data_ptr<T>();
    const T* const norm_bias = embed.norm_bias.template const_data_ptr<T>();
    const Rows<T> inner_rows = writable<T>(inner);
    T* const centred_bias = embedding_bias.template mutable_data_ptr<T>();
    for (int64_t i = 0; i < h; ++i) {
      const T* const from = embedding_rows[i];
      for (int64_t j = 0; j <= e; ++j) inner_rows[i][j] = norm[i] * from[j];
      inner_rows[i][e + 1] = norm_bias[i];
      centred_bias[i] = from[e];
    }
    centre(inner_rows[0], h, e + 2);
    const T* const block_norm = weights.norm.template const_data_ptr<T>();
    const T* const block_bias = weights.norm_bias.template const_data_ptr<T>();
    const T* const in_bias = weights.in_bias.template const_data_ptr<T>();
    const Rows<const T> in = readable<T>(weights.in);
    const Rows<T> sample_rows = writable<T>(sample);
    T* const bias_of_first = first_bias.template mutable_data_ptr<T>();
    for (int64_t i = 0; i < h; ++i) {
      const T* const from = in[i];
      for (int64_t j = 0; j < h; ++j) sample_rows[i][j] = from[j] * block_norm[j];
      bias_of_first[i] = static_cast<T>(in_bias[i] + dot(from, block_bias, h));
    }
    matmul(product, sample, inner);
    const Rows<const T> products = readable<T>(product);
    T* const factors = by_factor.template mutable_data_ptr<T>();
    T* const norms = by_norm.template mutable_data_ptr<T>();
    for (int64_t i = 0; i < h; ++i) {
      factors[i] = products[i][e];
      norms[i] = products[i][e + 1];
    }
  }

  Tensor of_noise() const { return columns(embedding, 0, embedding.size(1) - 1); }
  Tensor of_scaled() const { return columns(product, 0, product.size(1) - 2); }

 private:
  static int64_t size(const Embedding& embed) { return embed.weight.size(0); }
  static int64_t noise_size(const Embedding& embed) { return embed.weight.size(1); }
};

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

    Tensor grad_sample = torch::stable::new_empty(noise_, {size, size});
    matmul(grad_sample, grad_product_, transposed(folded_.inner));
    grad_in(grad_sample);
    Tensor grad_inner = torch::stable::new_empty(noise_, {size, noise_size + 2});
    matmul(grad_inner, transposed(folded_.sample), grad_product_);
    const Rows<S> inner_rows = writable<S>(grad_inner);
    centre(inner_rows[0], size, noise_size + 2);
    const S* const norm = embed_.norm.const_data_ptr<S>();
    const Rows<const S> embedding = readable<S>(folded_.embedding);
    S* const grad_norm = grad_embed_->norm.template mutable_data_ptr<S>();
    S* const grad_norm_bias = grad_embed_->norm_bias.template mutable_data_ptr<S>();
    for (int64_t i = 0; i < size; ++i) {
      const S* const inner = inner_rows[i];
      for (int64_t j = 0; j <= noise_size; ++j) embedding_rows[i][j] += norm[i] * inner[j];
      grad_norm[i] += static_cast<S>(dot(inner, embedding[i], noise_size + 1));
      grad_norm_bias[i] += inner[noise_size + 1];
    }
    centre(embedding_rows[0], size, noise_size + 1);
    const Rows<S> weight_rows = writable<S>(grad_embed_->weight);
    S* const grad_bias = grad_embed_->bias.template mutable_data_ptr<S>();
    for (int64_t i = 0; i < size; ++i) {
      std::copy_n(embedding_rows[i], noise_size, weight_rows[i]);
      grad_bias[i] = embedding_rows[i][noise_size];
    }
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

  // Gradients of the block's norm and of the half of its first layer that reads it.
  void grad_in(const Tensor& grad_sample) {
    const int64_t size = rows_.size(1);
    const S* const norm = weights_.norm.template const_data_ptr<S>();
    const S* const norm_bias = weights_.norm_bias.template const_data_ptr<S>();
    const S* const grad_bias = std::as_const(gradients_->in_bias).template const_data_ptr<S>();
    std::vector<double> of_norm(static_cast<size_t>(size));
    std::vector<double> of_bias(static_cast<size_t>(size));
    const Rows<const S> in = readable<S>(weights_.in);
    const Rows<const S> grads = readable<S>(grad_sample);
    const Rows<S> grads_in = writable<S>(gradients_->in);
    for (int64_t i = 0; i < size; ++i) {
      const S* const from = in[i];
      const S* const grad = grads[i];
      S* const to = grads_in[i];
      for (int64_t j = 0; j < size; ++j) {
        to[j] = grad[j] * norm[j] + grad_bias[i] * norm_bias[j];
        of_norm[j] += grad[j] * from[j];
        of_bias[j] += grad_bias[i] * from[j];
      }
    }
    const auto narrow = [](double value) { return static_cast<S>(value); };
    std::transform(of_norm.begin(), of_norm.end(), gradients_->norm.template mutable_data_ptr<S>(),
                   narrow);
    std::transform(of_bias.begin(), of_bias.end(),
                   gradients_->norm_bias.template mutable_data_ptr<S>(), narrow);
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
