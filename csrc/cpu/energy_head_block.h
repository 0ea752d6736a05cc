// A block of the energy head on CPUs: e + down(silu(gate) * up), where (gate, up) is an MLP of
// LayerNorm(e) and of a condition that all samples of a position share. What stands in front of
// the MLP, and makes e, is a template argument: see `forward` and `backward`.
//
// The matmuls are those of matmul_into.h, the steps between them energy_head_rows.cpp. The half of
// the first matmul that reads the condition runs once per position. Rows [P * N, H] go through in
// blocks of whole positions whose passing activations stay in cache and in the same pages of
// memory; weight gradients are accumulated over the blocks by the matmuls themselves, in float32 or
// float64; where that sum would be rounded to 16 bits after every block, one block holds all rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/dtype_dispatch.h"
#include "cpu/energy_head_rows.h"
#include "cpu/matmul_into.h"
#include "cpu/pooled_tensor.h"
#include "cpu/registration.h"
#include "cpu/row_tasks.h"
#include "cpu/task_sums.h"
#include "cpu/weight_sums.h"
#include "cpu/workspace.h"

namespace calm::energy_head {

// Rows of a block, about; 4 MB of activations at H = 256 in float32. Whole tiles of twelve rows
// (see cpu/sgemm.cpp), as many for one of two or three threads as for another.
constexpr int64_t kBlockRows = 504;
constexpr int64_t kBlockRowsPerThread = 252;
// What a thread keeps from call to call: activations and gradients of a block of rows, operands in
// packed order.
struct Memory {
  ReusedMemory<std::byte> operand;
  ReusedMemory<std::byte> product;
  ReusedMemory<std::byte> first;
  ReusedMemory<std::byte> second;
  ReusedMemory<std::byte> gate_up;
  ReusedMemory<std::byte> shared;
  ReusedMemory<std::byte> statistics;
  ReusedMemory<std::byte> partial;
  ReusedMemory<std::byte> upper;
  ReusedMemory<std::byte> rows;  // these five are the input's
  ReusedMemory<std::byte> narrow_rows;
  ReusedMemory<std::byte> narrow_grads;
  ReusedMemory<std::byte> weights;
  ReusedMemory<std::byte> input_upper;
  ReusedMemory<float> left;
  PackedRight of_condition;
  PackedRight of_sample;
  PackedRight of_noise;
  PackedRight mid;
  PackedRight out;
  PackedRight down;
  PackedRight activations;

  int64_t bytes() const {
    return operand.bytes() + product.bytes() + first.bytes() + second.bytes() + gate_up.bytes() +
           shared.bytes() + statistics.bytes() + partial.bytes() + upper.bytes() + rows.bytes() +
           narrow_rows.bytes() + narrow_grads.bytes() + weights.bytes() + input_upper.bytes() +
           left.bytes() + of_condition.bytes() + of_sample.bytes() + of_noise.bytes() +
           mid.bytes() + out.bytes() + down.bytes() + activations.bytes();
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
constexpr int kNumWeights = 10;

inline Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

// Rows of a block: whole positions.
inline int64_t block_rows(int64_t num_rows, int64_t num_samples) {
  const int64_t wanted = std::max(
      kBlockRows, kBlockRowsPerThread * static_cast<int64_t>(torch::stable::get_num_threads()));
  return std::min(num_rows, std::max<int64_t>(1, wanted / num_samples) * num_samples);
}

// What the forward keeps: the inputs of the three nonlinear steps.
struct Kept {
  Tensor first;    // [R, H]
  Tensor second;   // [R, H]
  Tensor gate_up;  // [R, 2H]

  Kept(const Tensor& like, int64_t num_rows, int64_t size)
      : first(pooled_empty(like, {num_rows, size})),
        second(pooled_empty(like, {num_rows, size})),
        gate_up(pooled_empty(like, {num_rows, 2 * size})) {}
  Kept(const Tensor& first_in, const Tensor& second_in, const Tensor& gate_up_in)
      : first(dense(first_in)), second(dense(second_in)), gate_up(dense(gate_up_in)) {}
};

// out [R, H] of a block, and what is kept for its gradients if `kept` has rows. For the rows
// [start, start + count) of a block of rows, an Input has
//   multiply_first(first_in, operand, start, count)   first_in [count, H] = what the first layer
//                              makes of the sample; `operand` [count, H] is free for what it reads
//   const S* residual(row)     row of e, after that
// and first_bias(), the first layer's [H].
template <typename S, typename Input>
void forward(Input& input, const Tensor& condition, const Weights& weights,
             Workspace<Memory>& memory, Tensor& out, Kept& kept) {
  const int64_t num_rows = out.size(0);
  const int64_t size = weights.size();
  const int64_t num_positions = condition.size(0);
  const int64_t num_samples = num_rows / num_positions;
  const bool keeps = kept.first.size(0) == num_rows;
  const int64_t block = block_rows(num_rows, num_samples);
  // One buffer for what a matmul reads: the input's, both activations and the product in turn.
  Tensor operand = memory.matrix(memory->operand, out, block, size);
  Tensor passing = memory.matrix(memory->gate_up, out, keeps ? 0 : block, 2 * size);
  Tensor narrow_passing = memory.matrix(memory->first, out, keeps ? 0 : block, size);
  Tensor shared = memory.matrix(memory->shared, out, num_positions, size);
  ReusedMemory<float>& left = memory->left;
  const RightOperand of_condition(transposed(weights.of_condition()), num_positions,
                                  memory->of_condition);
  multiply_onto_row(shared, input.first_bias(), condition, of_condition, left);
  const RightOperand mid(transposed(weights.mid), num_rows, memory->mid);
  const RightOperand out_weight(transposed(weights.out), num_rows, memory->out);
  const RightOperand down(transposed(weights.down), num_rows, memory->down);
  const S* shared_rows = shared.const_data_ptr<S>();
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t count = std::min(block, num_rows - start);
    const Tensor read = rows(operand, 0, count);
    Tensor first_in = keeps ? rows(kept.first, start, count) : rows(narrow_passing, 0, count);
    input.multiply_first(first_in, operand, start, count);
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
                               input.residual(start + first), weights.down_bias.const_data_ptr<S>(),
                               row_of<S>(out, start + first), n, size});
    });
    const Tensor some_out = rows(out, start, count);
    multiply_onto(some_out, some_out, read, down, left);
  }
}

// Where the column sums of a task lie in its row of partial sums, in units of H; the input's
// follow.
enum Sum : int64_t { kInBias, kMidBias, kOutBias, kDownBias = kOutBias + 2, kInputSums };

// The sums over rows of a backward pass: weight gradients, and column sums a task.
template <typename S>
class RowSums {
 public:
  using T = ComputeOf<S>;

  // Of blocks of rows as `like`; `num_sums` of up to `size` columns each. Products have at least
  // `fewest_rows`.
  RowSums(Workspace<Memory>& memory, const Tensor& like, int64_t num_sums, int64_t size,
          int64_t fewest_rows, bool weight_grads)
      : memory_(memory),
        sums_(weight_grads && multiplies(like, fewest_rows), memory->activations, memory->left),
        size_(size),
        num_sums_(num_sums),
        weight_grads_(weight_grads) {
    num_tasks_ = num_row_tasks(like.size(0));
    Tensor partial = memory.matrix_of<T>(memory->partial, num_tasks_, num_sums * size_);
    partial_ = row_of<T>(partial, 0);
    std::fill_n(partial_, partial.numel(), T(0));
  }

  bool weight_grads() const { return weight_grads_; }
  // Whether operands go into packed order, and a sum over rows is two.
  bool packs() const { return sums_.packs(); }

  // Where the next product with rows [count, size] on the right has them written: into `plain` or,
  // where this library multiplies, into packed order.
  void prepare(int64_t count, int64_t size) {
    if (packs()) memory_->activations.prepare_in_two(count, size);
    count_ = count;
  }
  RowTarget<S> target(Tensor& plain, int64_t first) {
    if constexpr (std::is_same_v<S, float>) {
      PackedRight& packed = memory_->activations;
      if (packs()) return {packed.data(), plain.size(1), first, count_, packed.step()};
    }
    return {row_of<S>(plain, first), plain.size(1)};
  }

  // sum (and its upper half) = a^T b, or that added to it; b was written to its target.
  void accumulate(Tensor sum, Tensor& upper, bool starts, const Tensor& a, const Tensor& b) {
    if (!weight_grads_) return;
    const RightOperand right = packs() ? RightOperand(memory_->activations)
                                       : RightOperand(b, a.size(1), memory_->activations);
    sums_.accumulate(sum, upper, starts, a, right);
  }
  // The same for rows b that lie somewhere already.
  void accumulate_rows(Tensor sum, Tensor& upper, bool starts, const Tensor& a, const Tensor& b) {
    if (weight_grads_) sums_.accumulate(sum, upper, starts, a, sums_.pack(b, a.size(1)));
  }

  // The column sums of the task that begins at row `first` of a block.
  T* of_task(int64_t first, int64_t which) {
    return partial_ + (first / kTaskRows * num_sums_ + which) * size_;
  }
  // All tasks' sum, of `count` columns.
  std::vector<S> finished(int64_t which, int64_t count) const {
    std::vector<S> sum(static_cast<size_t>(count));
    add_tasks(partial_ + which * size_, num_tasks_, num_sums_ * size_, count, sum.data());
    return sum;
  }
  // All tasks' [sum.size(0)] from `which` on.
  void finish(Tensor& sum, int64_t which) const {
    add_tasks(partial_ + which * size_, num_tasks_, num_sums_ * size_, sum.size(0),
              sum.mutable_data_ptr<S>());
  }

 private:
  Workspace<Memory>& memory_;
  WeightSums sums_;
  int64_t size_;
  int64_t num_sums_;
  bool weight_grads_;
  int64_t num_tasks_;
  int64_t count_ = 0;
  T* partial_;
};

// Rows of a block in the backward pass: all of them where sums are rounded to 16 bits.
template <typename S>
int64_t backward_rows(int64_t num_rows, int64_t num_samples, bool weight_grads) {
  constexpr bool kAccumulates = std::is_same_v<S, ComputeOf<S>>;
  return weight_grads && !kAccumulates ? num_rows : block_rows(num_rows, num_samples);
}

// Gradients of a block from its condition on: of `condition`, and of those weights that the input
// does not read. An Input has kNumSums and, for the rows [start, start + count) of a block of rows,
//   backward(sums, grad_first, start, count)   grad_first [count, H] of what multiply_first wrote
// which also sums grad_out's columns to kDownBias.
template <typename S, typename Input>
void backward(Input& input, const Tensor& grad_out, const Tensor& condition, const Weights& weights,
              Workspace<Memory>& memory, const Kept& kept, RowSums<S>& sums, int64_t block,
              Tensor& grad_condition, Weights& gradients) {
  const int64_t num_rows = grad_out.size(0);
  const int64_t size = weights.size();
  const int64_t num_positions = condition.size(0);
  const int64_t num_samples = num_rows / num_positions;
  Tensor product = memory.matrix(memory->product, grad_out, block, size);
  Tensor grad_second = memory.matrix(memory->second, grad_out, block, size);
  Tensor grad_first = memory.matrix(memory->first, grad_out, block, size);
  Tensor grad_gate_up = memory.matrix(memory->gate_up, grad_out, block, 2 * size);
  Tensor grad_shared = memory.matrix(memory->shared, grad_out, num_positions, size);
  const int64_t part = sums.packs() ? size : 0;
  // The upper halves of sums over rows, to be added to the gradients, which hold the lower ones.
  Tensor all_upper = memory.matrix(memory->upper, grad_out, 4 * part, size);
  Tensor upper_mid = rows(all_upper, 0, part);
  Tensor upper_down = rows(all_upper, part, part);
  Tensor upper_out = rows(all_upper, 2 * part, 2 * part);
  ReusedMemory<float>& left = memory->left;
  const RightOperand down(weights.down, num_rows, memory->down);
  const RightOperand out_weight(weights.out, num_rows, memory->out);
  const RightOperand mid(weights.mid, num_rows, memory->mid);
  for (int64_t start = 0; start < num_rows; start += block) {
    const int64_t count = std::min(block, num_rows - start);
    const bool starts = start == 0;
    const Tensor some_product = rows(product, 0, count);
    const Tensor some_second = rows(grad_second, 0, count);
    const Tensor some_first = rows(grad_first, 0, count);
    const Tensor some_gate_up = rows(grad_gate_up, 0, count);
    const Tensor some_grad_out = rows(grad_out, start, count);

    multiply(some_product, some_grad_out, down, left);
    sums.prepare(count, size);
    for_row_tasks(count, [&](int64_t first, int64_t n) {
      run_rows<S>(GatedBackwardRows<S>{row_of<S>(kept.gate_up, start + first),
                                       row_of<S>(std::as_const(product), first),
                                       sums.target(product, first), row_of<S>(grad_gate_up, first),
                                       sums.of_task(first, kOutBias), n, size});
    });
    sums.accumulate(gradients.down, upper_down, starts, some_grad_out, some_product);

    const auto silu_backward = [&](const Tensor& x, Tensor& grad, Sum sum) {
      for_row_tasks(count, [&](int64_t first, int64_t n) {
        run_rows<S>(SiluBackwardRows<S>{row_of<S>(x, start + first), row_of<S>(grad, first),
                                        sums.target(product, first), sums.of_task(first, sum), n,
                                        size});
      });
    };
    multiply(some_second, some_gate_up, out_weight, left);
    silu_backward(kept.second, grad_second, kMidBias);
    sums.accumulate(gradients.out, upper_out, starts, some_gate_up, some_product);

    multiply(some_first, some_second, mid, left);
    silu_backward(kept.first, grad_first, kInBias);
    sums.accumulate(gradients.mid, upper_mid, starts, some_second, some_product);

    torch::stable::parallel_for(
        0, count / num_samples, std::max<int64_t>(1, kTaskRows / num_samples),
        [&](int64_t begin, int64_t end) {
          run_rows<S>(SampleSumRows<S>{row_of<S>(std::as_const(grad_first), begin * num_samples),
                                       row_of<S>(grad_shared, start / num_samples + begin),
                                       end - begin, num_samples, size});
        });
    input.backward(sums, grad_first, start, count);
  }
  const RightOperand of_condition(weights.of_condition(), num_positions, memory->of_condition);
  multiply(grad_condition, grad_shared, of_condition, left);
  if (!sums.weight_grads()) return;
  if (sums.packs()) {
    add_onto(gradients.mid, upper_mid);
    add_onto(gradients.down, upper_down);
    add_onto(gradients.out, upper_out);
  }
  multiply(gradients.of_condition(), transposed(grad_shared),
           RightOperand(condition, size, memory->activations), left);
  sums.finish(gradients.in_bias, kInBias);
  sums.finish(gradients.mid_bias, kMidBias);
  sums.finish(gradients.out_bias, kOutBias);
  sums.finish(gradients.down_bias, kDownBias);
}

}  // namespace calm::energy_head
