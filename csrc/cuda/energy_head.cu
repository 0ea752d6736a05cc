// Launchers and registration of the energy head's block; the device code is
// energy_head_kernel.cuh, the matmuls are torch's. The half of the first matmul that reads the
// condition runs once per position.
//
// Work: 30 H^2 operations a row and 6 H^2 a position, forward and backward.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include <algorithm>
#include <tuple>

#include "cuda/dtype_dispatch.cuh"
#include "cuda/energy_head_kernel.cuh"
#include "cuda/registration.cuh"

namespace calm {
namespace {

constexpr int64_t kMaxBlocks = 1 << 16;

Tensor columns(const Tensor& matrix, int64_t first, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 1, first, count);
}

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// out = a b
void matmul(Tensor out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()));
}

// out = start + a b; start may be out, or a row for all
void matmul_onto(Tensor out, const Tensor& start, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cuda_addmm_out(out.get(), start.get(), a.get(), b.get(), 1.0, 1.0));
}

ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
T* written(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Launches one kernel after the other on a stream.
struct Launcher {
  cudaStream_t stream;

  template <typename... Parameters, typename... Arguments>
  void over_elements(int64_t count, void (*kernel)(Parameters...), Arguments... arguments) const {
    launch((count + kHeadThreads - 1) / kHeadThreads, kernel, arguments...);
  }

  template <typename... Parameters, typename... Arguments>
  void over_rows(int64_t num_rows, void (*kernel)(Parameters...), Arguments... arguments) const {
    launch((num_rows + kHeadWarps - 1) / kHeadWarps, kernel, arguments...);
  }

 private:
  template <typename... Parameters, typename... Arguments>
  void launch(int64_t blocks, void (*kernel)(Parameters...), Arguments... arguments) const {
    if (blocks == 0) return;
    kernel<<<static_cast<unsigned>(std::min(blocks, kMaxBlocks)), kHeadThreads, 0, stream>>>(
        arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
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

struct Kept {
  Tensor first;    // [R, H]
  Tensor second;   // [R, H]
  Tensor gate_up;  // [R, 2H]
};

template <typename S>
void forward(const Launcher& launcher, const Tensor& e, const Tensor& condition,
             const Weights& weights, double eps, Tensor& out, const Kept& kept) {
  using T = Compute<S>;
  const int64_t num_rows = e.size(0);
  const int64_t size = weights.size();
  const int64_t count = num_rows * size;
  const int64_t num_samples = num_rows / condition.size(0);
  Tensor operand = torch::stable::new_empty(e, {num_rows, size});
  Tensor statistics = torch::stable::new_empty(e, {2, num_rows}, compute_type(e));
  T* const mean = written<T>(statistics);
  Tensor shared = torch::stable::new_empty(e, {condition.size(0), size});
  matmul_onto(shared, weights.in_bias, condition, transposed(weights.of_condition()));

  launcher.over_rows(num_rows, &layer_norm_kernel<S>, read<S>(e), read<S>(weights.norm),
                     read<S>(weights.norm_bias), written<S>(operand), mean, mean + num_rows,
                     num_rows, size, eps);
  matmul(kept.first, operand, transposed(weights.of_sample()));
  launcher.over_elements(count, &silu_kernel<S>, written<S>(kept.first), read<S>(shared),
                         written<S>(operand), num_rows, num_samples, size);
  matmul_onto(kept.second, weights.mid_bias, operand, transposed(weights.mid));
  launcher.over_elements(count, &silu_kernel<S>, written<S>(kept.second),
                         static_cast<const S*>(nullptr), written<S>(operand), num_rows, num_samples,
                         size);
  matmul_onto(kept.gate_up, weights.out_bias, operand, transposed(weights.out));
  launcher.over_elements(count, &gated_kernel<S>, read<S>(kept.gate_up), read<S>(e),
                         read<S>(weights.down_bias), written<S>(operand), written<S>(out), num_rows,
                         size);
  matmul_onto(out, out, operand, transposed(weights.down));
}

struct Gradients {
  Tensor e;
  Tensor condition;
  Weights weights;
};

// sum = sum of the rows of values; sum_by_unit that of values * unit row of x, where x is given.
template <typename S>
void sum_rows(const Launcher& launcher, const Tensor& values, const Tensor& sum,
              const Tensor* x = nullptr, const Tensor* statistics = nullptr,
              const Tensor* sum_by_unit = nullptr) {
  using T = Compute<S>;
  const int64_t num_rows = values.size(0);
  const int64_t size = values.size(1);
  const int64_t num_stretches = (num_rows + kHeadSumRows - 1) / kHeadSumRows;
  const int64_t count = num_stretches * size;
  Tensor partial = torch::stable::new_empty(values, {2, count}, compute_type(values));
  T* const partials = written<T>(partial);
  const T* const mean = statistics == nullptr ? nullptr : read<T>(*statistics);
  launcher.over_elements(count, &column_sums_kernel<S>,
                         ColumnSums<S>{read<S>(values), x == nullptr ? nullptr : read<S>(*x), mean,
                                       mean == nullptr ? nullptr : mean + num_rows, partials,
                                       partials + count, num_rows, size});
  launcher.over_elements(size, &finish_sums_kernel<S>, static_cast<const T*>(partials),
                         written<S>(sum), num_stretches, size);
  if (sum_by_unit != nullptr) {
    launcher.over_elements(size, &finish_sums_kernel<S>, static_cast<const T*>(partials + count),
                           written<S>(*sum_by_unit), num_stretches, size);
  }
}

template <typename S>
void backward(const Launcher& launcher, const Tensor& grad_out, const Tensor& e,
              const Tensor& condition, const Weights& weights, double eps, const Kept& kept,
              bool weight_grads, const Gradients& gradients) {
  using T = Compute<S>;
  const int64_t num_rows = e.size(0);
  const int64_t num_positions = condition.size(0);
  const int64_t num_samples = num_rows / num_positions;
  const int64_t size = weights.size();
  const int64_t count = num_rows * size;
  const auto rows = [&](int64_t width) { return torch::stable::new_empty(e, {num_rows, width}); };
  // What the forward's matmuls read, in turn; then the gradient of the normed rows.
  Tensor operand = rows(size);
  Tensor grad_gate_up = rows(2 * size);
  matmul(operand, grad_out, weights.down);
  launcher.over_elements(count, &gated_backward_kernel<S>, read<S>(kept.gate_up),
                         written<S>(operand), written<S>(grad_gate_up), num_rows, size);
  const Weights& sums = gradients.weights;
  if (weight_grads) {
    matmul(sums.down, transposed(grad_out), operand);
    sum_rows<S>(launcher, grad_out, sums.down_bias);
    sum_rows<S>(launcher, grad_gate_up, sums.out_bias);
  }
  Tensor grad_second = rows(size);
  matmul(grad_second, grad_gate_up, weights.out);
  launcher.over_elements(count, &silu_backward_kernel<S>, read<S>(kept.second),
                         written<S>(grad_second), written<S>(operand), count);
  if (weight_grads) {
    matmul(sums.out, transposed(grad_gate_up), operand);
    sum_rows<S>(launcher, grad_second, sums.mid_bias);
  }
  Tensor grad_first = rows(size);
  matmul(grad_first, grad_second, weights.mid);
  launcher.over_elements(count, &silu_backward_kernel<S>, read<S>(kept.first),
                         written<S>(grad_first), written<S>(operand), count);
  if (weight_grads) {
    matmul(sums.mid, transposed(grad_second), operand);
    sum_rows<S>(launcher, grad_first, sums.in_bias);
  }
  Tensor grad_shared = torch::stable::new_empty(e, {num_positions, size});
  launcher.over_elements(num_positions * size, &sample_sum_kernel<S>, read<S>(grad_first),
                         written<S>(grad_shared), num_positions, num_samples, size);
  matmul(gradients.condition, grad_shared, weights.of_condition());

  Tensor statistics = torch::stable::new_empty(e, {2, num_rows}, compute_type(e));
  T* const mean = written<T>(statistics);
  launcher.over_rows(num_rows, &layer_norm_kernel<S>, read<S>(e), read<S>(weights.norm),
                     read<S>(weights.norm_bias), written<S>(operand), mean, mean + num_rows,
                     num_rows, size, eps);
  if (weight_grads) {
    matmul(columns(sums.in, 0, size), transposed(grad_first), operand);
    matmul(columns(sums.in, size, size), transposed(grad_shared), condition);
  }
  matmul(operand, grad_first, weights.of_sample());
  if (weight_grads) {
    sum_rows<S>(launcher, operand, sums.norm_bias, &e, &statistics, &sums.norm);
  }
  launcher.over_rows(num_rows, &layer_norm_backward_kernel<S>, read<S>(e), read<S>(weights.norm),
                     static_cast<const T*>(mean), static_cast<const T*>(mean + num_rows),
                     read<S>(operand), read<S>(grad_out), written<S>(gradients.e), num_rows, size);
}

Tensor dense(const Tensor& tensor) { return torch::stable::contiguous(tensor); }

std::tuple<Tensor, Tensor, Tensor, Tensor> energy_head_block(
    const Tensor& e_in, const Tensor& condition, const Tensor& norm_weight, const Tensor& norm_bias,
    const Tensor& in_weight, const Tensor& in_bias, const Tensor& mid_weight,
    const Tensor& mid_bias, const Tensor& out_weight, const Tensor& out_bias,
    const Tensor& down_weight, const Tensor& down_bias, double eps, bool save_activations) {
  const int32_t device = e_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor e = dense(e_in);
  const Weights weights{dense(norm_weight), dense(norm_bias), in_weight,  in_bias,
                        mid_weight,         mid_bias,         out_weight, out_bias,
                        down_weight,        dense(down_bias)};
  const int64_t num_rows = e.size(0);
  const int64_t size = weights.size();
  Tensor out = torch::stable::new_empty(e, {num_rows, size});
  Kept kept{torch::stable::new_empty(e, {num_rows, size}),
            torch::stable::new_empty(e, {num_rows, size}),
            torch::stable::new_empty(e, {num_rows, 2 * size})};
  if (num_rows != 0) {
    const Launcher launcher{current_stream(device)};
    dispatch_floating(e.scalar_type(), [&]<typename S>() {
      forward<S>(launcher, e, condition, weights, eps, out, kept);
    });
  }
  if (save_activations) return {out, kept.first, kept.second, kept.gate_up};
  return {out, torch::stable::new_empty(e, {0, size}), torch::stable::new_empty(e, {0, size}),
          torch::stable::new_empty(e, {0, 2 * size})};
}

// Gradients of e, condition and the ten weights in order.
using BlockGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                  Tensor, Tensor, Tensor, Tensor>;

BlockGradients energy_head_block_backward(const Tensor& grad_out_in, const Tensor& e_in,
                                          const Tensor& condition, const Tensor& norm_weight,
                                          const Tensor& norm_bias, const Tensor& in_weight,
                                          const Tensor& in_bias, const Tensor& mid_weight,
                                          const Tensor& mid_bias, const Tensor& out_weight,
                                          const Tensor& out_bias, const Tensor& down_weight,
                                          const Tensor& down_bias, const Tensor& first,
                                          const Tensor& second, const Tensor& gate_up, double eps,
                                          bool weight_grads) {
  const int32_t device = e_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor grad_out = dense(grad_out_in);
  const Tensor e = dense(e_in);
  const Kept kept{dense(first), dense(second), dense(gate_up)};
  const Weights weights{dense(norm_weight), dense(norm_bias), in_weight,  in_bias,
                        mid_weight,         mid_bias,         out_weight, out_bias,
                        down_weight,        dense(down_bias)};
  const int64_t num_rows = e.size(0);
  const int64_t size = weights.size();
  const auto gradient = [&](std::initializer_list<int64_t> shape) {
    if (!weight_grads) return torch::stable::new_empty(e, {0});
    return num_rows == 0 ? torch::stable::new_zeros(e, shape) : torch::stable::new_empty(e, shape);
  };
  const auto positions = {condition.size(0), size};
  const Gradients gradients{
      torch::stable::new_empty(e, {num_rows, size}),
      num_rows == 0 ? torch::stable::new_zeros(e, positions)
                    : torch::stable::new_empty(e, positions),
      {gradient({size}), gradient({size}), gradient({size, 2 * size}), gradient({size}),
       gradient({size, size}), gradient({size}), gradient({2 * size, size}), gradient({2 * size}),
       gradient({size, size}), gradient({size})}};
  if (num_rows != 0) {
    const Launcher launcher{current_stream(device)};
    dispatch_floating(e.scalar_type(), [&]<typename S>() {
      backward<S>(launcher, grad_out, e, condition, weights, eps, kept, weight_grads, gradients);
    });
  }
  const Weights& w = gradients.weights;
  return {gradients.e, gradients.condition, w.norm, w.norm_bias, w.in,   w.in_bias,
          w.mid,       w.mid_bias,          w.out,  w.out_bias,  w.down, w.down_bias};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CUDA, m) {
  m.impl("energy_head_block", TORCH_BOX(&calm::energy_head_block));
  m.impl("energy_head_block_backward", TORCH_BOX(&calm::energy_head_block_backward));
}
