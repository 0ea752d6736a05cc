// A block of the energy head on CPUs: e + down(silu(gate) * up), where (gate, up) is an MLP of
// LayerNorm(e) and of a condition that all samples of a position share.
//
// The matmuls are those of matmul_into.h, the steps between them energy_head_rows.cpp. The half of
// the first matmul that reads the condition runs once per position. Rows [P * N, H] go through in
// blocks of whole positions whose passing activations stay in cache and in the same pages of
// memory; weight gradients are accumulated over the blocks by the matmuls themselves, in float32 or
// float64; where that sum would be rounded to 16 bits after every block, one block holds all rows.
//
// Work: 30 H^2 operations a row and 6 H^2 a position, forward and backward (36 H^2 a row without
// sharing). Fewest bytes: e, grad_out and weights read, out and gradients written, and what the
// forward keeps for the backward, 4 H numbers a row, written and read once.

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/dtype_dispatch.h"
#include "cpu/energy_head_rows.h"
#include "cpu/large_pages.h"
#include "cpu/matmul_into.h"
#include "cpu/registration.h"
#include "cpu/workspace.h"

namespace calm {
namespace {

// Rows of a block, about; 4 MB of activations at H = 256 in float32.
constexpr int64_t kBlockRows = 512;
constexpr int64_t kBlockRowsPerThread = 256;
// Rows that one task of the pool takes: some 10 microseconds of work.
constexpr int64_t kTaskRows = 16;

ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
T* row_of(Tensor& tensor, int64_t row) {
  return tensor.mutable_data_ptr<T>() + row * tensor.size(1);
}

template <typename T>
const T* row_of(const Tensor& tensor, int64_t row) {
  return tensor.const_data_ptr<T>() + row * tensor.size(1);
}

// function(first, count) for pieces of [0, num_rows) whose borders no thread count moves.
template <typename Function>
void for_row_tasks(int64_t num_rows, const Function& function) {
  const int64_t num_tasks = (num_rows + kTaskRows - 1) / kTaskRows;
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kTaskRows;
      function(first, std::min(kTaskRows, num_rows - first));
    }
  });
}

// What a thread keeps from call to call: activations and gradients of a block of rows, operands in
// packed order.
struct Memory {
  ReusedMemory<std::byte> normed;
  ReusedMemory<std::byte> product;
  ReusedMemory<std::byte> first;
  ReusedMemory<std::byte> second;
  ReusedMemory<std::byte> gate_up;
  ReusedMemory<std::byte> shared;
  ReusedMemory<std::byte> statistics;
  ReusedMemory<std::byte> partial;
  ReusedMemory<std::byte> upper;
  ReusedMemory<float> left;
  PackedRight of_condition;
  PackedRight of_sample;
  PackedRight mid;
  PackedRight out;
  PackedRight down;
  PackedRight activations;

  int64_t bytes() const {
    return normed.bytes() + product.bytes() + first.bytes() + second.bytes() + gate_up.bytes() +
           shared.bytes() + statistics.bytes() + partial.bytes() + upper.bytes() + left.bytes() +
           of_condition.bytes() + of_sample.bytes() + mid.bytes() + out.bytes() + down.bytes() +
           activations.bytes();
  }
};

struct Weights {
  Tensor norm;
  Tensor norm_bias;
  Tensor in;  // [H, 2H]: columns that read the sample, then those that read the condition
  Tensor in_bias;
  Tensor mid;
  Tensor mid_bias;
  Tensor out;  // [2H, H]
  Tensor out_bias;
  Tensor down;
  Tensor down_bias;

  int64_t size() const { return mid.size(0); }
  Tensor of_sample() const { return columns(in, 0, size()); }
  Tensor of_condition() const { return columns(in, size(), size()); }
};

Tensor new_rows(const Tensor& like, int64_t num_rows, int64_t size) {
  Tensor result = torch::stable::new_empty(like, {num_rows, size});
  const size_t bytes = static_cast<size_t>(result.numel()) * result.element_size();
  use_large_pages(result.mutable_data_ptr(), bytes);
  return result;
}

// Rows of a block: whole positions.
int64_t block_rows(int64_t num_rows, int64_t num_samples) {
  const int64_t wanted = std::max(
      kBlockRows, kBlockRowsPerThread * static_cast<int64_t>(torch::stable::get_num_threads()));
  return std::min(num_rows, std::max<int64_t>(1, wanted / num_samples) * num_samples);
}

// What the forward keeps: the inputs of the three nonlinear steps.
struct Kept {
  Tensor first;    // [R, H]
  Tensor second;   // [R, H]
  Tensor gate_up;  // [R, 2H]
};

template <typename S>
void forward(const Tensor& e, const Tensor& condition, int64_t num_samples, const Weights& weights,
             double eps, Tensor& out, Kept& kept) {
  using T = ComputeOf<S>;
  const int64_t num_rows = e.size(0);
  const int64_t size = weights.size();
  const bool keeps = kept.first.size(0) == num_rows;
  const int64_t block = std::min(num_rows, block_rows(num_rows, num_samples));
  // One buffer for what a matmul reads: normed, both activations and the product in turn.
  Workspace<Memory> memory;
  Tensor operand = memory.matrix(memory->normed, e, block, size);
  Tensor passing = memory.matrix(memory->gate_up, e, keeps ? 0 : block, 2 * size);
  Tensor narrow_passing = memory.matrix(memory->first, e, keeps ? 0 : block, size);
  Tensor statistics = memory.matrix_of<T>(memory->statistics, 2, block);
  T* const mean = row_of<T>(statistics, 0);
  T* const rstd = row_of<T>(statistics, 1);
  const int64_t num_positions = condition.size(0);
  Tensor shared = memory.matrix(memory->shared, e, num_positions, size);
  ReusedMemory<float>& left = memory->left;
  const RightOperand of_condition(transposed(weights.of_condition()), num_positions,
                                  memory->of_condition);
  multiply_onto_row(shared, weights.in_bias, condition, of_condition, left);
  const RightOperand of_sample(transposed(weights.of_sample()), num_rows, memory->of_sample);
  const RightOperand mid(transposed(weights.mid), num_rows, memory->mid);
  const RightOperand out_weight(transposed(weights.out), num_rows, memory->out);
  const RightOperand down(transposed(weights.down), num_rows, memory->down);
  const S* shared_rows = shared.const_data_ptr<S>();
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t count = std::min(block, num_rows - start);
    const Tensor read = rows(operand, 0, count);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      const RowTarget<S> normed{row_of<S>(operand, first), size};
      run_rows<S>(LayerNormRows<S>{row_of<S>(e, start + first), weights.norm.const_data_ptr<S>(),
                                   weights.norm_bias.const_data_ptr<S>(), normed, mean + first,
                                   rstd + first, n, size, eps});
    });
    Tensor first_in = keeps ? rows(kept.first, start, count) : rows(narrow_passing, 0, count);
    multiply(first_in, read, of_sample, left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(SiluRows<S>{row_of<S>(first_in, first), shared_rows, row_of<S>(operand, first),
                              start + first, n, num_samples, size});
    });
    Tensor second_in = keeps ? rows(kept.second, start, count) : rows(narrow_passing, 0, count);
    multiply_onto_row(second_in, weights.mid_bias, read, mid, left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(SiluRows<S>{row_of<S>(second_in, first), nullptr, row_of<S>(operand, first), 0, n,
                              num_samples, size});
    });
    Tensor gate_up = keeps ? rows(kept.gate_up, start, count) : rows(passing, 0, count);
    multiply_onto_row(gate_up, weights.out_bias, read, out_weight, left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(GatedRows<S>{row_of<S>(std::as_const(gate_up), first), row_of<S>(operand, first),
                               row_of<S>(e, start + first), weights.down_bias.const_data_ptr<S>(),
                               row_of<S>(out, start + first), n, size});
    });
    const Tensor some_out = rows(out, start, count);
    multiply_onto(some_out, some_out, read, down, left);
  }
}

struct Gradients {
  Tensor e;
  Tensor condition;
  Weights weights;
};

// The upper halves of sums over rows, to be added to the gradients, which hold the lower ones.
struct UpperSums {
  Tensor in;
  Tensor mid;
  Tensor down;
  Tensor out;
};

// Where the column sums of a task lie in its row of partial sums, in units of H.
enum Sum : int64_t {
  kNorm,
  kNormBias,
  kInBias,
  kMidBias,
  kOutBias,
  kDownBias = kOutBias + 2,
  kSums
};

template <typename S>
void backward(const Tensor& grad_out, const Tensor& e, const Tensor& condition, int64_t num_samples,
              const Weights& weights, double eps, const Kept& kept, bool weight_grads,
              Gradients& gradients) {
  using T = ComputeOf<S>;
  const int64_t num_rows = e.size(0);
  const int64_t size = weights.size();
  const bool accumulates = compute_type(e) == e.scalar_type();
  const int64_t block = std::min(
      num_rows, weight_grads && !accumulates ? num_rows : block_rows(num_rows, num_samples));
  Workspace<Memory> memory;
  Tensor normed = memory.matrix(memory->normed, e, block, size);
  Tensor product = memory.matrix(memory->product, e, block, size);
  Tensor grad_second = memory.matrix(memory->second, e, block, size);
  Tensor grad_first = memory.matrix(memory->first, e, block, size);
  Tensor grad_gate_up = memory.matrix(memory->gate_up, e, block, 2 * size);
  Tensor statistics = memory.matrix_of<T>(memory->statistics, 2, block);
  T* const mean = row_of<T>(statistics, 0);
  T* const rstd = row_of<T>(statistics, 1);
  Tensor grad_shared = memory.matrix(memory->shared, e, condition.size(0), size);
  const int64_t num_tasks = (block + kTaskRows - 1) / kTaskRows;
  Tensor partial = memory.matrix_of<T>(memory->partial, num_tasks, kSums * size);
  std::fill_n(row_of<T>(partial, 0), partial.numel(), T(0));
  ReusedMemory<float>& left = memory->left;
  const RightOperand down(weights.down, num_rows, memory->down);
  const RightOperand out_weight(weights.out, num_rows, memory->out);
  const RightOperand mid(weights.mid, num_rows, memory->mid);
  const RightOperand of_sample(weights.of_sample(), num_rows, memory->of_sample);
  const bool packs = weight_grads && multiplies(product, size);
  const int64_t part = packs ? size : 0;
  Tensor all_upper = memory.matrix(memory->upper, e, 5 * part, size);
  UpperSums upper{rows(all_upper, 0, part), rows(all_upper, part, part),
                  rows(all_upper, 2 * part, part), rows(all_upper, 3 * part, 2 * part)};
  const auto sums = [&](int64_t first, Sum which) {
    return row_of<T>(partial, first / kTaskRows) + which * size;
  };
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t count = std::min(block, num_rows - start);
    // What the forward's matmuls read goes into `product` or, where one of this library's products
    // reads it, into packed order.
    if (packs) memory->activations.prepare_in_two(count, size);
    const auto activations = [&](Tensor& plain, int64_t first) {
      if constexpr (std::is_same_v<S, float>) {
        PackedRight& packed = memory->activations;
        if (packs) return RowTarget<S>{packed.data(), size, first, count, packed.step()};
      }
      return RowTarget<S>{row_of<S>(plain, first), size};
    };
    const auto accumulate = [&](Tensor sum, Tensor& other, const Tensor& a, const Tensor& b) {
      if (!weight_grads) return;
      if (packs) {
        multiply_in_two(sum, other, start != 0, transposed(a), memory->activations, left);
        return;
      }
      const RightOperand right(b, size, memory->activations);
      if (start == 0) {
        multiply(sum, transposed(a), right, left);
      } else {
        multiply_onto(sum, sum, transposed(a), right, left);
      }
    };
    const Tensor some_normed = rows(normed, 0, count);
    const Tensor some_product = rows(product, 0, count);
    const Tensor some_second = rows(grad_second, 0, count);
    const Tensor some_first = rows(grad_first, 0, count);
    const Tensor some_gate_up = rows(grad_gate_up, 0, count);
    const Tensor some_grad_out = rows(grad_out, start, count);

    multiply(some_product, some_grad_out, down, left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(GatedBackwardRows<S>{row_of<S>(kept.gate_up, start + first),
                                       row_of<S>(std::as_const(product), first),
                                       activations(product, first), row_of<S>(grad_gate_up, first),
                                       sums(first, kOutBias), n, size});
    });
    accumulate(gradients.weights.down, upper.down, some_grad_out, some_product);

    const auto silu_backward = [&](const Tensor& x, Tensor& grad, Sum sum) {
      for_row_tasks(count, [&](int64_t first, int64_t n) {
        run_rows<S>(SiluBackwardRows<S>{row_of<S>(x, start + first), row_of<S>(grad, first),
                                        activations(product, first), sums(first, sum), n, size});
      });
    };
    multiply(some_second, some_gate_up, out_weight, left);
    silu_backward(kept.second, grad_second, kMidBias);
    accumulate(gradients.weights.out, upper.out, some_gate_up, some_product);

    multiply(some_first, some_second, mid, left);
    silu_backward(kept.first, grad_first, kInBias);
    accumulate(gradients.weights.mid, upper.mid, some_second, some_product);

    torch::stable::parallel_for(
        0, count / num_samples, std::max<int64_t>(1, kTaskRows / num_samples),
        [&](int64_t begin, int64_t end) {
          run_rows<S>(SampleSumRows<S>{row_of<S>(std::as_const(grad_first), begin * num_samples),
                                       row_of<S>(grad_shared, start / num_samples + begin),
                                       end - begin, num_samples, size});
        });
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(LayerNormRows<S>{row_of<S>(e, start + first), weights.norm.const_data_ptr<S>(),
                                   weights.norm_bias.const_data_ptr<S>(),
                                   activations(normed, first), mean + first, rstd + first, n, size,
                                   eps});
    });
    if (weight_grads) {
      accumulate(columns(gradients.weights.in, 0, size), upper.in, some_first, some_normed);
    }
    multiply(rows(gradients.e, start, count), some_first, of_sample, left);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(LayerNormBackwardRows<S>{
          row_of<S>(e, start + first), weights.norm.const_data_ptr<S>(), mean + first, rstd + first,
          row_of<S>(grad_out, start + first), row_of<S>(gradients.e, start + first),
          sums(first, kNorm), sums(first, kNormBias), sums(first, kDownBias), n, size});
    });
  }
  const RightOperand of_condition(weights.of_condition(), condition.size(0), memory->of_condition);
  multiply(gradients.condition, grad_shared, of_condition, left);
  if (!weight_grads) return;
  if (packs) {
    add_onto(columns(gradients.weights.in, 0, size), upper.in);
    add_onto(gradients.weights.mid, upper.mid);
    add_onto(gradients.weights.down, upper.down);
    add_onto(gradients.weights.out, upper.out);
  }
  multiply(columns(gradients.weights.in, size, size), transposed(grad_shared),
           RightOperand(condition, size, memory->activations), left);
  const T* const parts = row_of<T>(std::as_const(partial), 0);
  const auto finish = [&](Tensor& sum, Sum which) {
    S* const values = sum.mutable_data_ptr<S>();
    const int64_t count = sum.size(0);
    for (int64_t h = 0; h < count; ++h) {
      T total = 0;
      for (int64_t task = 0; task < num_tasks; ++task) {
        total += parts[(task * kSums + which) * size + h];
      }
      values[h] = static_cast<S>(total);
    }
  };
  finish(gradients.weights.norm, kNorm);
  finish(gradients.weights.norm_bias, kNormBias);
  finish(gradients.weights.in_bias, kInBias);
  finish(gradients.weights.mid_bias, kMidBias);
  finish(gradients.weights.out_bias, kOutBias);
  finish(gradients.weights.down_bias, kDownBias);
}

Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

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
  Tensor out = new_rows(e, num_rows, size);
  Kept kept{new_rows(e, kept_rows, size), new_rows(e, kept_rows, size),
            new_rows(e, kept_rows, 2 * size)};
  if (num_rows != 0) {
    const int64_t num_samples = num_rows / condition.size(0);
    dispatch_floating(e.scalar_type(), [&]<typename S>() {
      forward<S>(e, condition, num_samples, weights, eps, out, kept);
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
  const Kept kept{dense(first), dense(second), dense(gate_up)};
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
  Gradients gradients{
      new_rows(e, num_rows, size),
      num_rows == 0 ? torch::stable::new_zeros(e, positions)
                    : torch::stable::new_empty(e, positions),
      {gradient({size}), gradient({size}), gradient({size, 2 * size}), gradient({size}),
       gradient({size, size}), gradient({size}), gradient({2 * size, size}), gradient({2 * size}),
       gradient({size, size}), gradient({size})}};
  if (num_rows != 0) {
    const int64_t num_samples = num_rows / condition.size(0);
    dispatch_floating(e.scalar_type(), [&]<typename S>() {
      backward<S>(grad_out, e, condition, num_samples, weights, eps, kept, weight_grads, gradients);
    });
  }
  const Weights& w = gradients.weights;
  return {gradients.e, gradients.condition, w.norm, w.norm_bias, w.in,   w.in_bias,
          w.mid,       w.mid_bias,          w.out,  w.out_bias,  w.down, w.down_bias};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("energy_head_block", TORCH_BOX(&calm::energy_head_block));
  m.impl("energy_head_block_backward", TORCH_BOX(&calm::energy_head_block_backward));
}
