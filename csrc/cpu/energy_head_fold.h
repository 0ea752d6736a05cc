// What stands in front of the energy head's first MLP, folded into the MLP's first layer.
//
// That is a linear layer and two norms of its result: e = LayerNorm(W u + b) and LayerNorm(e). A
// norm subtracts a mean, which is linear, and divides by a number a row. So with r and s the
// factors of the two norms in a row, and Wc, bc less their means over columns,
//   e = r (g * z) + h,    z = Wc u + bc,    s (e - mean e) * g' + h'  read by the first layer's A:
//   first = r s (B u + b') + s b'' + A h',    B = A g' C g Wc,  b' = A g' C g bc,  b'' = A g' C h
// where C subtracts means and g, h, g', h' are the norms' weights and biases. A product with E + 2
// inputs a row takes the place of one with H.
//
// Work: 2 H^2 (E + 2) operations for B, twice that for the gradients.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/energy_head_block.h"

namespace calm::energy_head {

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

  // From the gradients of what the weights became to theirs. Those of B, b' and b'' are
  // grad_product [H, E + 2], those of Wc and bc are grad_embedding [H, E + 1], which is worked in;
  // grad_embed's norm holds what e gives it, and gradients.in_bias is there.
  void backward(const Embedding& embed, const Weights& weights, const Tensor& grad_product,
                Tensor& grad_embedding, Embedding& grad_embed, Weights& gradients) const {
    const int64_t h = size(embed);
    const int64_t e = noise_size(embed);
    grad_in(weights, grad_product, gradients);
    Tensor grad_inner = torch::stable::new_empty(inner, {h, e + 2});
    matmul(grad_inner, transposed(sample), grad_product);
    const Rows<T> inner_rows = writable<T>(grad_inner);
    centre(inner_rows[0], h, e + 2);
    const T* const norm = embed.norm.template const_data_ptr<T>();
    const Rows<const T> centred = readable<T>(embedding);
    const Rows<T> grads = writable<T>(grad_embedding);
    T* const grad_norm = grad_embed.norm.template mutable_data_ptr<T>();
    T* const grad_norm_bias = grad_embed.norm_bias.template mutable_data_ptr<T>();
    for (int64_t i = 0; i < h; ++i) {
      const T* const from = inner_rows[i];
      for (int64_t j = 0; j <= e; ++j) grads[i][j] += norm[i] * from[j];
      grad_norm[i] += static_cast<T>(dot(from, centred[i], e + 1));
      grad_norm_bias[i] += from[e + 1];
    }
    centre(grads[0], h, e + 1);
    const Rows<T> weight_rows = writable<T>(grad_embed.weight);
    T* const grad_bias = grad_embed.bias.template mutable_data_ptr<T>();
    for (int64_t i = 0; i < h; ++i) {
      std::copy_n(grads[i], e, weight_rows[i]);
      grad_bias[i] = grads[i][e];
    }
  }

 private:
  // Of the block's norm and of the half of its first layer that reads it.
  void grad_in(const Weights& weights, const Tensor& grad_product, Weights& gradients) const {
    const int64_t size = weights.size();
    Tensor grad_sample = torch::stable::new_empty(sample, {size, size});
    matmul(grad_sample, grad_product, transposed(inner));
    const T* const norm = weights.norm.template const_data_ptr<T>();
    const T* const norm_bias = weights.norm_bias.template const_data_ptr<T>();
    const T* const grad_bias = std::as_const(gradients.in_bias).template const_data_ptr<T>();
    std::vector<double> of_norm(static_cast<size_t>(size));
    std::vector<double> of_bias(static_cast<size_t>(size));
    const Rows<const T> in = readable<T>(weights.in);
    const Rows<const T> grads = readable<T>(grad_sample);
    const Rows<T> grads_in = writable<T>(gradients.in);
    for (int64_t i = 0; i < size; ++i) {
      const T* const from = in[i];
      const T* const grad = grads[i];
      T* const to = grads_in[i];
      for (int64_t j = 0; j < size; ++j) {
        to[j] = grad[j] * norm[j] + grad_bias[i] * norm_bias[j];
        of_norm[j] += grad[j] * from[j];
        of_bias[j] += grad_bias[i] * from[j];
      }
    }
    const auto narrow = [](double value) { return static_cast<T>(value); };
    std::transform(of_norm.begin(), of_norm.end(), gradients.norm.template mutable_data_ptr<T>(),
                   narrow);
    std::transform(of_bias.begin(), of_bias.end(),
                   gradients.norm_bias.template mutable_data_ptr<T>(), narrow);
  }

  static int64_t size(const Embedding& embed) { return embed.weight.size(0); }
  static int64_t noise_size(const Embedding& embed) { return embed.weight.size(1); }
};

}  // namespace calm::energy_head
