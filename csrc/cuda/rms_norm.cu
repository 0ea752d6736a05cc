// RMSNorm on its own: x read and out written once forward, grad_out and x read and grad_x written
// once backward (a row comes from cache the second time), one launch each and one for the sum over
// rows.

#include "cuda/rms_norm_launch.cuh"

namespace calm {
namespace {

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x_in, const Tensor& weight_in, double eps) {
  const int32_t device = x_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const ScalarType compute_type =
      x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor rstd = torch::stable::new_empty(x, {x.size(0)}, compute_type);
  if (x.size(0) == 0) return {out, rstd};
  dispatch_floating(x.scalar_type(), [&]<typename In>() {
    launch_rms_norm<In>(x, weight, rstd, out, eps, false, current_stream(device));
  });
  return {out, rstd};
}

// (gradient of x, gradient of the weight)
std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_out_in, const Tensor& x_in,
                                             const Tensor& weight_in, const Tensor& rstd_in) {
  const int32_t device = x_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor grad_out = torch::stable::contiguous(grad_out_in);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor rstd = torch::stable::contiguous(rstd_in);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  if (x.size(0) == 0) return {grad_x, torch::stable::new_zeros(x, {x.size(1)})};
  Tensor grad_weight = torch::stable::new_empty(x, {x.size(1)});
  dispatch_floating(x.scalar_type(), [&]<typename In>() {
    launch_rms_norm_backward<In>(x, weight, rstd, input<In>(grad_out), nullptr, grad_x, grad_weight,
                                 current_stream(device));
  });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&calm::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&calm::rms_norm_backward));
}
