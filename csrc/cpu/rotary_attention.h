// Causal attention of rotated queries and keys on CPUs, float32: what its operators share.
#pragma once

#include <cstdint>

#include "cpu/registration.h"

namespace calm {

// Heads of [B, T, num_heads * width], in rows of `row_stride` numbers.
template <typename T>
struct Heads {
  T* data;
  int64_t length;
  int64_t width;
  int64_t row_stride;

  T* at(int64_t b, int64_t t, int64_t head) const {
    return data + (b * length + t) * row_stride + head * width;
  }
};

// Cosines and sines [1 or B, T, width].
struct Angles {
  const float* cos;
  const float* sin;
  int64_t batch_stride;
  int64_t width;

  int64_t at(int64_t b, int64_t t) const { return b * batch_stride + t * width; }
};

// Of dense tensors for sequences of `length`.
inline Angles angles_of(const Tensor& cos, const Tensor& sin) {
  return {cos.const_data_ptr<float>(), sin.const_data_ptr<float>(),
          cos.size(0) == 1 ? 0 : cos.size(1) * cos.size(2), cos.size(2)};
}

struct AttentionInputs {
  int64_t batch;
  int64_t length;
  int64_t num_heads;
  int64_t num_key_heads;
  int64_t width;
  float scale;
  Heads<const float> queries;
  Heads<const float> keys;
  Heads<const float> values;
  Angles angles;

  int64_t group() const { return num_heads / num_key_heads; }
};

// out = softmax(scale * q k^T) v for every head; log_sums [B, num_heads, T] of the weights.
void attend(const AttentionInputs& in, const Heads<float>& out, float* log_sums);

// Gradients of queries, keys and values, each written once.
void attend_backward(const AttentionInputs& in, const Heads<const float>& grad_out,
                     const Heads<const float>& out, const float* log_sums,
                     const Heads<float>& grad_queries, const Heads<float>& grad_keys,
                     const Heads<float>& grad_values);

}  // namespace calm
