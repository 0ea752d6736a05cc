// The gated feed-forward block on CPUs: x + Wd (silu(Wg n) * (Wu n)), n = RMSNorm(x).
//
// The nine matmuls of forward and backward are torch's; the steps between them are
// gated_ffn_rows.cpp. Rows go through in blocks whose activations (normed, product and gradients of
// the products: H + 3 I numbers a row) stay in the shared cache and in the same pages of memory:
// fresh tensors of rows x I would cost more time in page faults than the pointwise steps take.
// Weight gradients are accumulated over the blocks by the matmuls themselves, in float32 or
// float64; where that sum would be rounded to 16 bits after every block, one block holds all rows.
//
// Work: 18 R H I operations. Fewest bytes: x, grad_out and weights read, out and gradients written,
// and what the forward keeps for the backward, gate_up [R, 2I], written and read once.

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <utility>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/dtype_dispatch.h"
#include "cpu/gated_ffn_rows.h"
#include "cpu/matmul_into.h"
#include "cpu/pooled_tensor.h"
#include "cpu/registration.h"
#include "cpu/row_tasks.h"
#include "cpu/task_sums.h"
#include "cpu/weight_sums.h"
#include "cpu/workspace.h"

namespace calm {
namespace {

// Rows of a block: 18 MB of activations at H = 512, I = 1280 in float32. Of 256, 512, 1024, 2048
// and all 4096 rows measured at 2 threads, 1024 and 2048 were fastest; every thread needs its
// share. Whole tiles of twelve rows (see cpu/sgemm.cpp).
constexpr int64_t kBlockRows = 1008;
constexpr int64_t kBlockRowsPerThread = 252;
int64_t block_rows() {
  return std::max(kBlockRows,
                  kBlockRowsPerThread * static_cast<int64_t>(torch::stable::get_num_threads()));
}

ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

bool accumulates(const Tensor& x) { return compute_type(x) == x.scalar_type(); }

// What a thread keeps from call to call.
struct Memory {
  ReusedMemory<std::byte> normed;
  ReusedMemory<std::byte> product;
  ReusedMemory<std::byte> gate_up;
  ReusedMemory<std::byte> grad_gate_up;
  ReusedMemory<std::byte> upper;
  ReusedMemory<float> left;
  PackedRight gate_weight;
  PackedRight up_weight;
  PackedRight down_weight;
  PackedRight activations;

  int64_t bytes() const {
    return normed.bytes() + product.bytes() + gate_up.bytes() + grad_gate_up.bytes() +
           upper.bytes() + left.bytes() + gate_weight.bytes() + up_weight.bytes() +
           down_weight.bytes() + activations.bytes();
  }
};

struct Weights {
  Tensor norm;
  Tensor gate;
  Tensor up;
  Tensor down;

  int64_t hidden_size() const { return norm.size(0); }
  int64_t size() const { return gate.size(0); }
};

template <typename S>
void forward(const Tensor& x, const Weights& weights, double eps, Tensor& out, Tensor& rstd,
             Tensor& gate_up) {
  const int64_t num_rows = x.size(0);
  const int64_t hidden_size = weights.hidden_size();
  const int64_t size = weights.size();
  const bool keeps = gate_up.size(0) == num_rows;
  const int64_t block = std::min(num_rows, block_rows());
  Workspace<Memory> memory;
  Tensor normed = memory.matrix(memory->normed, x, block, hidden_size);
  Tensor product = memory.matrix(memory->product, x, block, size);
  Tensor passing = memory.matrix(memory->gate_up, x, keeps ? 0 : block, 2 * size);
  const RightOperand gate(transposed(weights.gate), num_rows, memory->gate_weight);
  const RightOperand up(transposed(weights.up), num_rows, memory->up_weight);
  const RightOperand down(transposed(weights.down), num_rows, memory->down_weight);
  const S* norm_weight = weights.norm.const_data_ptr<S>();
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t count = std::min(block, num_rows - start);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      rms_norm<S>({row_of<S>(x, start + first), norm_weight, row_of<S>(normed, first),
                   rstd.mutable_data_ptr<ComputeOf<S>>() + start + first, n, hidden_size, eps});
    });
    const Tensor some_normed = rows(normed, 0, count);
    const Tensor products = keeps ? rows(gate_up, start, count) : rows(passing, 0, count);
    multiply(columns(products, 0, size), some_normed, gate, memory->left);
    multiply(columns(products, size, size), some_normed, up, memory->left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      swiglu<S>({row_of<S>(products, first), row_of<S>(product, first), n, size});
    });
    multiply_onto(rows(out, start, count), rows(x, start, count), rows(product, 0, count), down,
                  memory->left);
  }
}

struct Gradients {
  Tensor x;
  Tensor norm_weight;
  Tensor gate_weight;
  Tensor up_weight;
  Tensor down_weight;
};

template <typename S>
void backward(const Tensor& grad_out, const Tensor& x, const Weights& weights, const Tensor& rstd,
              const Tensor& gate_up, bool weight_grads, Gradients& gradients) {
  using T = ComputeOf<S>;
  const int64_t num_rows = x.size(0);
  const int64_t hidden_size = weights.hidden_size();
  const int64_t size = weights.size();
  const bool kept = gate_up.size(0) == num_rows;
  const int64_t block =
      std::min(num_rows, weight_grads && !accumulates(x) ? num_rows : block_rows());
  const bool needs_normed = weight_grads || !kept;
  Workspace<Memory> memory;
  Tensor normed = memory.matrix(memory->normed, x, needs_normed ? block : 0, hidden_size);
  Tensor product = memory.matrix(memory->product, x, block, size);
  Tensor grad_gate_up = memory.matrix(memory->grad_gate_up, x, block, 2 * size);
  Tensor again = memory.matrix(memory->gate_up, x, kept ? 0 : block, 2 * size);
  const bool packs = weight_grads && multiplies(product, hidden_size) && multiplies(normed, size);
  WeightSums sums(packs, memory->activations, memory->left);
  const int64_t part = packs ? size : 0;
  Tensor upper_gate = memory.matrix(memory->upper, x, 3 * part, hidden_size);
  const Tensor upper_up = rows(upper_gate, part, part);
  const Tensor upper_down =
      torch::stable::view(rows(upper_gate, 2 * part, part), {packs ? hidden_size : 0, size});
  upper_gate = rows(upper_gate, 0, part);
  // A row of partial sums for every task.
  const int64_t num_tasks = num_row_tasks(block);
  Tensor partial = torch::stable::new_zeros(x, {num_tasks, hidden_size}, compute_type(x));
  const S* norm_weight = weights.norm.const_data_ptr<S>();
  const T* rstds = rstd.const_data_ptr<T>();
  const RightOperand down(weights.down, num_rows, memory->down_weight);
  const RightOperand gate(weights.gate, num_rows, memory->gate_weight);
  const RightOperand up(weights.up, num_rows, memory->up_weight);
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t count = std::min(block, num_rows - start);
    const Tensor some_normed = rows(normed, 0, needs_normed ? count : 0);
    if (needs_normed) {
      for_row_tasks(count, [&](int64_t first, int64_t n) {
        rms_norm_again<S>({row_of<S>(x, start + first), norm_weight, rstds + start + first,
                           row_of<S>(normed, first), n, hidden_size});
      });
    }
    const Tensor products = kept ? rows(gate_up, start, count) : rows(again, 0, count);
    if (!kept) {
      const auto multiply_again = [&](const Tensor& part, const Tensor& weight) {
        const RightOperand right(transposed(weight), count, memory->activations);
        multiply(part, some_normed, right, memory->left);
      };
      multiply_again(columns(products, 0, size), weights.gate);
      multiply_again(columns(products, size, size), weights.up);
    }
    const Tensor some_grad_out = rows(grad_out, start, count);
    const Tensor some_product = rows(product, 0, count);
    multiply(some_product, some_grad_out, down, memory->left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      swiglu_backward<S>({row_of<S>(products, first), row_of<S>(product, first),
                          row_of<S>(grad_gate_up, first), n, size});
    });
    const Tensor some_grads = rows(grad_gate_up, 0, count);
    const Tensor grad_gate = columns(some_grads, 0, size);
    const Tensor grad_up = columns(some_grads, size, size);
    if (weight_grads) {
      {
        const RightOperand right = sums.pack(some_product, hidden_size);
        sums.accumulate(gradients.down_weight, upper_down, start == 0, some_grad_out, right);
      }
      const RightOperand right = sums.pack(some_normed, size);
      sums.accumulate(gradients.gate_weight, upper_gate, start == 0, grad_gate, right);
      sums.accumulate(gradients.up_weight, upper_up, start == 0, grad_up, right);
    }
    Tensor grad_x = rows(gradients.x, start, count);
    multiply(grad_x, grad_gate, gate, memory->left);
    multiply_onto(grad_x, grad_x, grad_up, up, memory->left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      S* const grad = row_of<S>(grad_x, first);
      rms_norm_backward<S>({row_of<S>(x, start + first), norm_weight, rstds + start + first, grad,
                            row_of<S>(grad_out, start + first), grad,
                            row_of<T>(partial, first / kTaskRows), n, hidden_size});
    });
  }
  if (!weight_grads) return;
  if (packs) {
    add_onto(gradients.gate_weight, upper_gate);
    add_onto(gradients.up_weight, upper_up);
    add_onto(gradients.down_weight, upper_down);
  }
  add_tasks(row_of<T>(std::as_const(partial), 0), num_tasks, hidden_size, hidden_size,
            gradients.norm_weight.mutable_data_ptr<S>());
}

std::tuple<Tensor, Tensor, Tensor> gated_ffn(const Tensor& x_in, const Tensor& norm_weight,
                                             const Tensor& gate_weight, const Tensor& up_weight,
                                             const Tensor& down_weight, double eps,
                                             bool save_activations) {
  const Tensor x = torch::stable::contiguous(x_in);
  const Weights weights{torch::stable::contiguous(norm_weight), gate_weight, up_weight,
                        down_weight};
  const int64_t num_rows = x.size(0);
  Tensor out = pooled_empty(x, {num_rows, x.size(1)});
  Tensor rstd = torch::stable::new_empty(x, {num_rows}, compute_type(x));
  Tensor gate_up = pooled_empty(x, {save_activations ? num_rows : 0, 2 * weights.size()});
  if (num_rows == 0) return {out, rstd, gate_up};
  dispatch_floating(x.scalar_type(),
                    [&]<typename S>() { forward<S>(x, weights, eps, out, rstd, gate_up); });
  return {out, rstd, gate_up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_ffn_backward(
    const Tensor& grad_out_in, const Tensor& x_in, const Tensor& norm_weight,
    const Tensor& gate_weight, const Tensor& up_weight, const Tensor& down_weight,
    const Tensor& rstd_in, const Tensor& gate_up_in, bool weight_grads) {
  const Tensor grad_out = torch::stable::contiguous(grad_out_in);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor rstd = torch::stable::contiguous(rstd_in);
  const Tensor gate_up = torch::stable::contiguous(gate_up_in);
  const Weights weights{torch::stable::contiguous(norm_weight), gate_weight, up_weight,
                        down_weight};
  const int64_t num_rows = x.size(0);
  const int64_t hidden_size = weights.hidden_size();
  const int64_t size = weights.size();
  const auto gradient = [&](std::initializer_list<int64_t> shape) {
    if (!weight_grads) return torch::stable::new_empty(x, {0});
    return num_rows == 0 ? torch::stable::new_zeros(x, shape) : pooled_empty(x, shape);
  };
  Gradients gradients{pooled_empty(x, {num_rows, hidden_size}), gradient({hidden_size}),
                      gradient({size, hidden_size}), gradient({size, hidden_size}),
                      gradient({hidden_size, size})};
  if (num_rows != 0) {
    dispatch_floating(x.scalar_type(), [&]<typename S>() {
      backward<S>(grad_out, x, weights, rstd, gate_up, weight_grads, gradients);
    });
  }
  return {gradients.x, gradients.norm_weight, gradients.gate_weight, gradients.up_weight,
          gradients.down_weight};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("gated_ffn", TORCH_BOX(&calm::gated_ffn));
  m.impl("gated_ffn_backward", TORCH_BOX(&calm::gated_ffn_backward));
}
