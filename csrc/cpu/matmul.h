// torch's matmuls into memory that is there already. Below autograd and without the dispatcher.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cpu/registration.h"

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
inline void matmul(Tensor out, const Tensor& a, const Tensor& b) {
  STD_TORCH_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()) == 0, "matmul failed");
}

// out = beta * start + a b; start may be out
inline void matmul_onto(Tensor out, const Tensor& start, const Tensor& a, const Tensor& b,
                        double beta = 1.0) {
  STD_TORCH_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), start.get(), a.get(), b.get(), beta, 1.0) == 0,
      "matmul failed");
}

}  // namespace calm
