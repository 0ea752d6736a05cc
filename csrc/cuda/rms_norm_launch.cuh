// Launchers of RMSNorm, for rms_norm.cu and gated_ffn.cu; the device code and its mapping are in
// gated_ffn_kernel.cuh.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/dtype_dispatch.cuh"
#include "cuda/gated_ffn_kernel.cuh"
#include "cuda/registration.cuh"

namespace calm {
namespace {

// Enough blocks for every warp of the largest current chip several times over; the kernels stride.
constexpr int64_t kMaxBlocks = 1 << 16;
// The norm's backward leaves a row of sums a block.
constexpr int64_t kMaxNormBackwardBlocks = 1 << 10;
// Shared memory that every architecture gives a block without being asked.
constexpr size_t kMaxSharedBytes = 48 << 10;

int64_t blocks_for(int64_t num_rows, int64_t limit) {
  return std::min(limit, (num_rows + kFfnWarpsPerBlock - 1) / kFfnWarpsPerBlock);
}

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// function.template operator()<kCount>(): 16 bytes at a time where rows of `size` and all addresses
// allow it.
template <typename In, typename Function>
void with_vector(int64_t size, std::initializer_list<const void*> addresses,
                 const Function& function) {
  const bool fits =
      size % kFfnVector<In> == 0 && std::all_of(addresses.begin(), addresses.end(), is_aligned);
  if (fits) {
    function.template operator()<kFfnVector<In>>();
  } else {
    function.template operator()<1>();
  }
}

template <typename In>
struct Element {
  static constexpr ScalarType kType = ScalarType::Float;
};
template <>
struct Element<double> {
  static constexpr ScalarType kType = ScalarType::Double;
};

// The kernels' storage types name torch's 16-bit types by their bits.
template <typename In>
const In* input(const Tensor& tensor) {
  return static_cast<const In*>(tensor.const_data_ptr());
}

template <typename In>
In* output(Tensor& tensor) {
  return static_cast<In*>(tensor.mutable_data_ptr());
}

template <typename In>
void launch_rms_norm(const Tensor& x, const Tensor& norm_weight, Tensor& rstd, Tensor& normed,
                     double eps, bool has_rstd, cudaStream_t stream) {
  const RmsNormArguments<In> arguments{input<In>(x),
                                       input<In>(norm_weight),
                                       output<In>(normed),
                                       output<Compute<In>>(rstd),
                                       x.size(0),
                                       x.size(1),
                                       eps,
                                       has_rstd};
  with_vector<In>(
      x.size(1), {arguments.x, arguments.norm_weight, arguments.normed}, [&]<int kCount>() {
        rms_norm_kernel<In, kCount>
            <<<static_cast<unsigned>(blocks_for(x.size(0), kMaxBlocks)), kFfnThreads, 0, stream>>>(
                arguments);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
}

// grad_normed and grad_x may be one; no residual's gradient where grad_residual is null;
// grad_norm_weight may be empty: not wanted.
template <typename In>
void launch_rms_norm_backward(const Tensor& x, const Tensor& norm_weight, const Tensor& rstd,
                              const In* grad_normed, const In* grad_residual, Tensor& grad_x,
                              Tensor& grad_norm_weight, cudaStream_t stream) {
  using T = Compute<In>;
  const int64_t size = x.size(1);
  const int64_t blocks = blocks_for(x.size(0), kMaxNormBackwardBlocks);
  Tensor partial = torch::stable::new_empty(x, {blocks, size}, Element<T>::kType);
  RmsNormBackwardArguments<In> arguments{
      input<In>(x),       input<In>(norm_weight), input<T>(rstd), grad_normed, grad_residual,
      output<In>(grad_x), output<T>(partial),     nullptr,        x.size(0),   size};
  with_vector<In>(
      size,
      {arguments.x, arguments.norm_weight, arguments.grad_normed, arguments.grad_residual,
       arguments.grad_x},
      [&]<int kCount>() {
        const int64_t numbers = kFfnWarpsPerBlock * ffn_line_size<kCount>(size);
        size_t shared_bytes = static_cast<size_t>(numbers) * sizeof(T);
        Tensor lines = torch::stable::new_empty(x, {0}, Element<T>::kType);
        if (shared_bytes > kMaxSharedBytes) {
          lines = torch::stable::new_empty(x, {blocks, numbers}, Element<T>::kType);
          arguments.lines = output<T>(lines);
          shared_bytes = 0;
        }
        rms_norm_backward_kernel<In, kCount>
            <<<static_cast<unsigned>(blocks), kFfnThreads, shared_bytes, stream>>>(arguments);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      });
  if (grad_norm_weight.numel() == 0) return;
  column_sum_kernel<In><<<static_cast<unsigned>((size + 31) / 32), kFfnThreads, 0, stream>>>(
      arguments.partial, output<In>(grad_norm_weight), blocks, size);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace calm
