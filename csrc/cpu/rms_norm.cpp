// RMSNorm on CPUs, forward and backward: the rows of gated_ffn_rows.h over torch's pool.
//
// out = x * rstd * weight, rstd = (mean(x^2) + eps)^(-1/2), a row at a time. Fewest bytes: x read
// and out written once forward, grad_out and x read and grad_x written once backward; a row stays
// in L1 between its two passes. 4 operations an element forward, 10 backward: bound by memory.

#include <algorithm>

#include "cpu/dtype_dispatch.h"
#include "cpu/gated_ffn_rows.h"
#include "cpu/pooled_tensor.h"
#include "cpu/registration.h"
#include "cpu/task_sums.h"

namespace calm {
namespace {

// Rows whose column sums are added up as one; no thread count moves their borders.
constexpr int64_t kTaskRows = 32;
// Elements that are worth waking another thread for.
constexpr int64_t kGrain = 1 << 15;

ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// function(task, first row, rows) for all pieces of kTaskRows rows.
template <typename Function>
void for_row_tasks(int64_t num_rows, int64_t size, const Function& function) {
  const int64_t num_tasks = (num_rows + kTaskRows - 1) / kTaskRows;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, kTaskRows * size));
  torch::stable::parallel_for(0, num_tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kTaskRows;
      function(task, first, std::min(kTaskRows, num_rows - first));
    }
  });
}

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x_in, const Tensor& weight_in,
                                            double eps) {
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const int64_t num_rows = x.size(0);
  const int64_t size = x.size(1);
  Tensor out = pooled_empty(x, {num_rows, size});
  Tensor rstd = torch::stable::new_empty(x, {num_rows}, compute_type(x));
  dispatch_floating(x.scalar_type(), [&]<typename S>() {
    const S* in = x.const_data_ptr<S>();
    const S* scale = weight.const_data_ptr<S>();
    S* normed = out.mutable_data_ptr<S>();
    ComputeOf<S>* rstds = rstd.mutable_data_ptr<ComputeOf<S>>();
    for_row_tasks(num_rows, size, [&](int64_t, int64_t first, int64_t n) {
      rms_norm<S>({in + first * size, scale, normed + first * size, rstds + first, n, size, eps});
    });
  });
  return {out, rstd};
}

// (gradient of x, gradient of the weight)
std::tuple<Tensor, Tensor> rms_norm_backward_op(const Tensor& grad_out_in, const Tensor& x_in,
                                                const Tensor& weight_in, const Tensor& rstd_in) {
  const Tensor grad_out = torch::stable::contiguous(grad_out_in);
  const Tensor x = torch::stable::contiguous(x_in);
  const Tensor weight = torch::stable::contiguous(weight_in);
  const Tensor rstd = torch::stable::contiguous(rstd_in);
  const int64_t num_rows = x.size(0);
  const int64_t size = x.size(1);
  const int64_t num_tasks = (num_rows + kTaskRows - 1) / kTaskRows;
  Tensor grad_x = pooled_empty(x, {num_rows, size});
  Tensor grad_weight = torch::stable::new_empty(x, {size});
  Tensor partial = torch::stable::new_zeros(x, {num_tasks, size}, compute_type(x));
  dispatch_floating(x.scalar_type(), [&]<typename S>() {
    using T = ComputeOf<S>;
    const S* in = x.const_data_ptr<S>();
    const S* grad = grad_out.const_data_ptr<S>();
    const S* scale = weight.const_data_ptr<S>();
    const T* rstds = rstd.const_data_ptr<T>();
    S* result = grad_x.mutable_data_ptr<S>();
    T* sums = partial.mutable_data_ptr<T>();
    for_row_tasks(num_rows, size, [&](int64_t task, int64_t first, int64_t n) {
      const int64_t at = first * size;
      rms_norm_backward<S>({in + at, scale, rstds + first, grad + at, nullptr, result + at,
                            sums + task * size, n, size});
    });
    // In double: up to millions of pieces.
    add_tasks_in<double>(sums, num_tasks, size, size, grad_weight.mutable_data_ptr<S>());
  });
  return {grad_x, grad_weight};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&calm::rms_norm_forward));
  m.impl("rms_norm_backward", TORCH_BOX(&calm::rms_norm_backward_op));
}
