// torch's matmuls into memory that is there already, on the current stream. Below autograd and
// without the dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

#include "cuda/registration.cuh"

namespace calm {

inline Tensor columns(const Tensor& matrix, int64_t first, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 1, first, count);
}

inline Tensor rows(const Tensor& matrix, int64_t first, int64_t count) {
  Tensor whole = matrix;
  return torch::stable::narrow(whole, 0, first, count);
}

inline Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

// out = a b
inline void matmul(const Tensor& out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(aoti_torch_cuda_mm_out(out.get(), a.get(), b.get()) == 0, "matmul failed");
}

// out = start + a b
inline void matmul_onto(const Tensor& out, const Tensor& start, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(
      aoti_torch_cuda_addmm_out(out.get(), start.get(), a.get(), b.get(), 1.0, 1.0) == 0,
      "matmul failed");
}

}  // namespace calm
