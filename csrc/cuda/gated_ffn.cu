// Launchers and registration of the gated feed-forward block: its matmuls, torch's, and between
// them the kernels of gated_ffn_kernel.cuh.
//
// Gate and up are one matmul each way: their weights lie packed in a [2 I, H] matrix, copied there
// at the start (a thousandth of the operations' bytes at 16384 rows), so normed is read once and
// the gradient of normed comes out of one accumulation. The residual is what the last matmul adds
// to. 18 R H I operations, forward and backward.

#include "cuda/matmul.cuh"
#include "cuda/rms_norm_launch.cuh"

namespace calm {
namespace {

template <typename In>
SwigluArguments<In> swiglu_arguments(const Tensor& gate_up, Tensor& product) {
  return {input<In>(gate_up), output<In>(product), nullptr, product.size(0), product.size(1)};
}

template <typename In>
void launch_swiglu(const Tensor& gate_up, Tensor& product, cudaStream_t stream) {
  const SwigluArguments<In> arguments = swiglu_arguments<In>(gate_up, product);
  const auto blocks = static_cast<unsigned>(blocks_for(arguments.num_rows, kMaxBlocks));
  with_vector<In>(arguments.size, {arguments.gate_up, arguments.product}, [&]<int kCount>() {
    swiglu_kernel<In, kCount><<<blocks, kFfnThreads, 0, stream>>>(arguments);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <typename In>
void launch_swiglu_backward(const Tensor& gate_up, Tensor& product, Tensor& grad_gate_up,
                            cudaStream_t stream) {
  SwigluArguments<In> arguments = swiglu_arguments<In>(gate_up, product);
  arguments.grad_gate_up = output<In>(grad_gate_up);
  const auto blocks = static_cast<unsigned>(blocks_for(arguments.num_rows, kMaxBlocks));
  with_vector<In>(arguments.size, {arguments.gate_up, arguments.product, arguments.grad_gate_up},
                  [&]<int kCount>() {
                    swiglu_backward_kernel<In, kCount>
                        <<<blocks, kFfnThreads, 0, stream>>>(arguments);
                    STD_CUDA_KERNEL_LAUNCH_CHECK();
                  });
}

// [first; second] as one matrix.
Tensor packed(const Tensor& first, const Tensor& second) {
  const int64_t size = first.size(0);
  const Tensor both = torch::stable::new_empty(first, {2 * size, first.size(1)});
  Tensor upper = rows(both, 0, size);
  Tensor lower = rows(both, size, size);
  torch::stable::copy_(upper, first);
  torch::stable::copy_(lower, second);
  return both;
}

std::tuple<Tensor, Tensor, Tensor> gated_ffn(const Tensor& x_in, const Tensor& norm_weight_in,
                                             const Tensor& gate_weight, const Tensor& up_weight,
                                             const Tensor& down_weight, double eps,
                                             bool save_activations) {
  const int32_t device = x_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor norm_weight = torch::stable::contiguous(norm_weight_in);
  const int64_t num_rows = x.size(0);
  const int64_t size = gate_weight.size(0);
  const ScalarType compute_type =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(x, {num_rows, x.size(1)});
  Tensor rstd = torch::stable::new_empty(x, {num_rows}, compute_type);
  Tensor gate_up = torch::stable::new_empty(x, {num_rows, 2 * size});
  if (num_rows == 0) return {out, rstd, gate_up};
  dispatch_floating(x.scalar_type(), [&]<typename In>() {
    const cudaStream_t stream = current_stream(device);
    // out holds normed until the last matmul writes it.
    launch_rms_norm<In>(x, norm_weight, rstd, out, eps, false, stream);
    matmul(gate_up, out, transposed(packed(gate_weight, up_weight)));
    Tensor product = torch::stable::new_empty(x, {num_rows, size});
    launch_swiglu<In>(gate_up, product, stream);
    matmul_onto(out, x, product, transposed(down_weight));
  });
  if (!save_activations) gate_up = torch::stable::new_empty(x, {0, 2 * size});
  return {out, rstd, gate_up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_ffn_backward(
    const Tensor& grad_out_in, const Tensor& x_in, const Tensor& norm_weight_in,
    const Tensor& gate_weight, const Tensor& up_weight, const Tensor& down_weight,
    const Tensor& rstd_in, const Tensor& gate_up_in, bool weight_grads) {
  const int32_t device = x_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor grad_out = torch::stable::contiguous(grad_out_in);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor norm_weight = torch::stable::contiguous(norm_weight_in);
  Tensor rstd = torch::stable::contiguous(rstd_in);
  Tensor gate_up = torch::stable::contiguous(gate_up_in);
  const int64_t num_rows = x.size(0);
  const int64_t hidden_size = x.size(1);
  const int64_t size = gate_weight.size(0);
  const auto gradient = [&](std::initializer_list<int64_t> shape) {
    if (!weight_grads) return torch::stable::new_empty(x, {0});
    return num_rows == 0 ? torch::stable::new_zeros(x, shape) : torch::stable::new_empty(x, shape);
  };
  Tensor grad_x = torch::stable::new_empty(x, {num_rows, hidden_size});
  Tensor grad_norm_weight = gradient({hidden_size});
  Tensor grad_gate_weight = gradient({size, hidden_size});
  Tensor grad_up_weight = gradient({size, hidden_size});
  Tensor grad_down_weight = gradient({hidden_size, size});
  if (num_rows != 0) {
    dispatch_floating(x.scalar_type(), [&]<typename In>() {
      const cudaStream_t stream = current_stream(device);
      const bool kept = gate_up.size(0) == num_rows;
      const Tensor gate_and_up = packed(gate_weight, up_weight);
      Tensor normed =
          torch::stable::new_empty(x, {weight_grads || !kept ? num_rows : 0, hidden_size});
      if (normed.size(0) != 0) launch_rms_norm<In>(x, norm_weight, rstd, normed, 0.0, true, stream);
      if (!kept) {
        gate_up = torch::stable::new_empty(x, {num_rows, 2 * size});
        matmul(gate_up, normed, transposed(gate_and_up));
      }
      Tensor product = torch::stable::new_empty(x, {num_rows, size});
      matmul(product, grad_out, down_weight);
      Tensor grad_gate_up = torch::stable::new_empty(x, {num_rows, 2 * size});
      launch_swiglu_backward<In>(gate_up, product, grad_gate_up, stream);
      if (weight_grads) {
        matmul(grad_down_weight, transposed(grad_out), product);
        const Tensor both = torch::stable::new_empty(x, {2 * size, hidden_size});
        matmul(both, transposed(grad_gate_up), normed);
        torch::stable::copy_(grad_gate_weight, rows(both, 0, size));
        torch::stable::copy_(grad_up_weight, rows(both, size, size));
      }
      matmul(grad_x, grad_gate_up, gate_and_up);
      launch_rms_norm_backward<In>(x, norm_weight, rstd, input<In>(grad_x), input<In>(grad_out),
                                   grad_x, grad_norm_weight, stream);
    });
  }
  return {grad_x, grad_norm_weight, grad_gate_weight, grad_up_weight, grad_down_weight};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CUDA, m) {
  m.impl("gated_ffn", TORCH_BOX(&calm::gated_ffn));
  m.impl("gated_ffn_backward", TORCH_BOX(&calm::gated_ffn_backward));
}
