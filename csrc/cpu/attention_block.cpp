// A Llama layer's attention on CPUs, float32, forward and backward: x + Wo attend(Wq n, Wk n, Wv n)
// with n = RMSNorm(x), queries and keys rotated.
//
// Rows [B * T, H] go through the products in blocks, as in gated_ffn.cpp; queries, keys and values
// lie beside one another in a row. n is made again for the gradients of the weights.
//
// Work: 6 H (2 A + 2 K) operations a row, forward and backward, for A numbers of queries and K of
// keys, and attention's own. Fewest bytes: x, grad_out and weights read, out and gradients written,
// and 2 A + 2 K kept numbers a row written and read once.

#include <algorithm>
#include <cstddef>
#include <utility>

#include "cpu/gated_ffn_rows.h"
#include "cpu/pooled_tensor.h"
#include "cpu/registration.h"
#include "cpu/rotary_attention.h"
#include "cpu/row_tasks.h"
#include "cpu/task_sums.h"
#include "cpu/weight_sums.h"
#include "cpu/workspace.h"

namespace calm {
namespace {

// Rows of a block.
constexpr int64_t kBlockRows = 1008;

struct Memory {
  ReusedMemory<std::byte> normed;
  ReusedMemory<std::byte> grad_seen;
  ReusedMemory<std::byte> grad_projected;
  ReusedMemory<std::byte> partial;
  ReusedMemory<std::byte> upper;
  ReusedMemory<float> left;
  PackedRight query;
  PackedRight key;
  PackedRight value;
  PackedRight out;
  PackedRight activations;

  int64_t bytes() const {
    return normed.bytes() + grad_seen.bytes() + grad_projected.bytes() + partial.bytes() +
           upper.bytes() + left.bytes() + query.bytes() + key.bytes() + value.bytes() +
           out.bytes() + activations.bytes();
  }
};

struct Weights {
  Tensor norm;   // [H]
  Tensor query;  // [A, H]
  Tensor key;    // [K, H]
  Tensor value;  // [K, H]
  Tensor out;    // [H, A]

  int64_t hidden_size() const { return norm.size(0); }
  int64_t query_size() const { return query.size(0); }
  int64_t key_size() const { return key.size(0); }
  int64_t projected_size() const { return query_size() + 2 * key_size(); }
};

// Queries, keys and values of rows [R, A + 2 K].
struct Parts {
  Tensor query;
  Tensor key;
  Tensor value;

  Parts(const Tensor& projected, const Weights& weights)
      : query(columns(projected, 0, weights.query_size())),
        key(columns(projected, weights.query_size(), weights.key_size())),
        value(columns(projected, weights.query_size() + weights.key_size(), weights.key_size())) {}
};

struct Sequences {
  int64_t batch;
  int64_t length;
  Tensor cos;
  Tensor sin;
  float scale;

  AttentionInputs inputs(const Tensor& projected, const Weights& weights) const {
    const float* const data = projected.const_data_ptr<float>();
    const int64_t width = cos.size(2);
    const auto heads = [&](int64_t column) {
      return Heads<const float>{data + column, length, width, weights.projected_size()};
    };
    const int64_t keys = weights.query_size();
    return {batch, length,   keys / width, weights.key_size() / width,       width,
            scale, heads(0), heads(keys),  heads(keys + weights.key_size()), angles_of(cos, sin)};
  }
};

void forward(const Tensor& x, const Weights& weights, const Sequences& sequences, double eps,
             Tensor& out, Tensor& rstd, Tensor& projected, Tensor& seen, Tensor& log_sums) {
  const int64_t num_rows = x.size(0);
  const int64_t size = weights.hidden_size();
  const int64_t block = std::min(num_rows, kBlockRows);
  Workspace<Memory> memory;
  Tensor normed = memory.matrix(memory->normed, x, block, size);
  const RightOperand query(transposed(weights.query), num_rows, memory->query);
  const RightOperand key(transposed(weights.key), num_rows, memory->key);
  const RightOperand value(transposed(weights.value), num_rows, memory->value);
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t count = std::min(block, num_rows - start);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      rms_norm<float>({row_of<float>(x, start + first), weights.norm.const_data_ptr<float>(),
                       row_of<float>(normed, first), rstd.mutable_data_ptr<float>() + start + first,
                       n, size, eps});
    });
    const Tensor read = rows(normed, 0, count);
    const Parts parts(rows(projected, start, count), weights);
    multiply(parts.query, read, query, memory->left);
    multiply(parts.key, read, key, memory->left);
    multiply(parts.value, read, value, memory->left);
  }
  const int64_t width = sequences.cos.size(2);
  attend(sequences.inputs(projected, weights),
         {seen.mutable_data_ptr<float>(), sequences.length, width, weights.query_size()},
         log_sums.mutable_data_ptr<float>());
  const RightOperand out_weight(transposed(weights.out), num_rows, memory->out);
  multiply_onto(out, x, seen, out_weight, memory->left);
}

void backward(const Tensor& grad_out, const Tensor& x, const Weights& weights,
              const Sequences& sequences, const Tensor& rstd, const Tensor& projected,
              const Tensor& seen, const Tensor& log_sums, bool weight_grads, Tensor& grad_x,
              Weights& gradients) {
  const int64_t num_rows = x.size(0);
  const int64_t size = weights.hidden_size();
  const int64_t query_size = weights.query_size();
  const int64_t key_size = weights.key_size();
  const int64_t block = std::min(num_rows, kBlockRows);
  Workspace<Memory> memory;
  Tensor grad_seen = memory.matrix(memory->grad_seen, x, num_rows, query_size);
  Tensor grad_projected =
      memory.matrix(memory->grad_projected, x, num_rows, weights.projected_size());
  Tensor normed = memory.matrix(memory->normed, x, weight_grads ? block : 0, size);
  const bool packs =
      weight_grads && multiplies(normed, std::min(key_size, query_size)) && multiplies(seen, size);
  WeightSums sums(packs, memory->activations, memory->left);
  const int64_t part = packs ? 1 : 0;
  Tensor upper = memory.matrix(memory->upper, x, part * (2 * query_size + 2 * key_size), size);
  Tensor upper_query = rows(upper, 0, part * query_size);
  Tensor upper_key = rows(upper, part * query_size, part * key_size);
  Tensor upper_value = rows(upper, part * (query_size + key_size), part * key_size);
  Tensor upper_out =
      torch::stable::view(rows(upper, part * (query_size + 2 * key_size), part * query_size),
                          {part * size, query_size});
  const int64_t num_tasks = num_row_tasks(block);
  Tensor partial = memory.matrix_of<float>(memory->partial, num_tasks, size);
  std::fill_n(row_of<float>(partial, 0), partial.numel(), 0.0f);

  const RightOperand out_weight(weights.out, num_rows, memory->out);
  multiply(grad_seen, grad_out, out_weight, memory->left);
  const AttentionInputs in = sequences.inputs(projected, weights);
  const auto heads = [&](const float* data, int64_t row_stride) {
    return Heads<const float>{data, in.length, in.width, row_stride};
  };
  const auto grads = [&](int64_t column) {
    return Heads<float>{grad_projected.mutable_data_ptr<float>() + column, in.length, in.width,
                        weights.projected_size()};
  };
  attend_backward(in, heads(grad_seen.const_data_ptr<float>(), query_size),
                  heads(seen.const_data_ptr<float>(), query_size), log_sums.const_data_ptr<float>(),
                  grads(0), grads(query_size), grads(query_size + key_size));

  const RightOperand query(weights.query, num_rows, memory->query);
  const RightOperand key(weights.key, num_rows, memory->key);
  const RightOperand value(weights.value, num_rows, memory->value);
  const float* const norm = weights.norm.const_data_ptr<float>();
  const float* const rstds = rstd.const_data_ptr<float>();
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t count = std::min(block, num_rows - start);
    const bool starts = start == 0;
    const Tensor some_grad_out = rows(grad_out, start, count);
    const Parts parts(rows(grad_projected, start, count), weights);
    if (weight_grads) {
      {
        const RightOperand right = sums.pack(rows(seen, start, count), size);
        sums.accumulate(gradients.out, upper_out, starts, some_grad_out, right);
      }
      for_row_tasks(count, [&](int64_t first, int64_t n) {
        rms_norm_again<float>({row_of<float>(x, start + first), norm, rstds + start + first,
                               row_of<float>(normed, first), n, size});
      });
      const RightOperand right = sums.pack(rows(normed, 0, count), std::min(key_size, query_size));
      sums.accumulate(gradients.query, upper_query, starts, parts.query, right);
      sums.accumulate(gradients.key, upper_key, starts, parts.key, right);
      sums.accumulate(gradients.value, upper_value, starts, parts.value, right);
    }
    Tensor grad = rows(grad_x, start, count);
    multiply(grad, parts.query, query, memory->left);
    multiply_onto(grad, grad, parts.key, key, memory->left);
    multiply_onto(grad, grad, parts.value, value, memory->left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      float* const to = row_of<float>(grad, first);
      rms_norm_backward<float>({row_of<float>(x, start + first), norm, rstds + start + first, to,
                                row_of<float>(grad_out, start + first), to,
                                row_of<float>(partial, first / kTaskRows), n, size});
    });
  }
  if (!weight_grads) return;
  if (packs) {
    add_onto(gradients.query, upper_query);
    add_onto(gradients.key, upper_key);
    add_onto(gradients.value, upper_value);
    add_onto(gradients.out, upper_out);
  }
  add_tasks(row_of<float>(std::as_const(partial), 0), num_tasks, size, size,
            gradients.norm.mutable_data_ptr<float>());
}

Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

Sequences sequences_of(const Tensor& x, const Tensor& cos, const Tensor& sin, double scale) {
  return {x.size(0), x.size(1), dense(cos), dense(sin), static_cast<float>(scale)};
}

Tensor as_rows(const Tensor& x) {
  return torch::stable::view(x, {x.size(0) * x.size(1), x.size(2)});
}

// out [B, T, H]; kept: rstd [R], projected [R, A + 2 K], seen [R, A], log_sums [B, heads, T].
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> attention_block(
    const Tensor& x_in, const Tensor& norm_weight, const Tensor& query_weight,
    const Tensor& key_weight, const Tensor& value_weight, const Tensor& out_weight,
    const Tensor& cos, const Tensor& sin, double scale, double eps) {
  const Tensor x = dense(x_in);
  const Weights weights{dense(norm_weight), query_weight, key_weight, value_weight, out_weight};
  const Sequences sequences = sequences_of(x, cos, sin, scale);
  const int64_t num_rows = x.size(0) * x.size(1);
  Tensor out = pooled_empty(x, {x.size(0), x.size(1), x.size(2)});
  Tensor rstd = torch::stable::new_empty(x, {num_rows});
  Tensor projected = pooled_empty(x, {num_rows, weights.projected_size()});
  Tensor seen = pooled_empty(x, {num_rows, weights.query_size()});
  const int64_t num_heads = weights.query_size() / sequences.cos.size(2);
  Tensor log_sums = torch::stable::new_empty(x, {x.size(0), num_heads, x.size(1)});
  if (num_rows != 0) {
    Tensor out_rows = as_rows(out);
    forward(as_rows(x), weights, sequences, eps, out_rows, rstd, projected, seen, log_sums);
  }
  return {out, rstd, projected, seen, log_sums};
}

// Gradients of x and the five weights in order.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_block_backward(
    const Tensor& grad_out_in, const Tensor& x_in, const Tensor& norm_weight,
    const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
    const Tensor& out_weight, const Tensor& cos, const Tensor& sin, const Tensor& rstd,
    const Tensor& projected, const Tensor& seen, const Tensor& log_sums, double scale,
    bool weight_grads) {
  const Tensor x = dense(x_in);
  const Weights weights{dense(norm_weight), query_weight, key_weight, value_weight, out_weight};
  const bool empty = x.numel() == 0;
  const auto gradient = [&](const Tensor& like) {
    if (!weight_grads) return torch::stable::new_empty(x, {0});
    return empty ? torch::stable::new_zeros(like, like.sizes())
                 : torch::stable::new_empty(like, like.sizes());
  };
  Tensor grad_x = pooled_empty(x, {x.size(0), x.size(1), x.size(2)});
  Weights gradients{gradient(norm_weight), gradient(query_weight), gradient(key_weight),
                    gradient(value_weight), gradient(out_weight)};
  if (!empty) {
    Tensor grad_rows = as_rows(grad_x);
    backward(as_rows(dense(grad_out_in)), as_rows(x), weights, sequences_of(x, cos, sin, scale),
             dense(rstd), dense(projected), dense(seen), dense(log_sums), weight_grads, grad_rows,
             gradients);
  }
  return {grad_x, gradients.norm, gradients.query, gradients.key, gradients.value, gradients.out};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("attention_block", TORCH_BOX(&calm::attention_block));
  m.impl("attention_block_backward", TORCH_BOX(&calm::attention_block_backward));
}
