// Matrix products into memory that is there already, below autograd and without the dispatcher:
// torch's, or this library's own where that is faster (cpu/sgemm.h).
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "cpu/registration.h"
#include "cpu/sgemm.h"

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

// out = a b, by torch
inline void matmul(Tensor out, const Tensor& a, const Tensor& b) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
}

// out = beta * start + a b, by torch; start may be out
inline void matmul_onto(Tensor out, const Tensor& start, const Tensor& a, const Tensor& b,
                        double beta = 1.0) {
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(out.get(), start.get(), a.get(), b.get(), beta, 1.0));
}

inline Matrix<const float> matrix_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<float>(), tensor.size(0), tensor.size(1), tensor.stride(0),
          tensor.stride(1)};
}

// The right operand of products: packed once, used by as many as there are.
class RightOperand {
 public:
  RightOperand() = default;
  RightOperand(const Tensor& matrix, int64_t left_rows) { assign(matrix, left_rows); }

  // `left_rows` will be multiplied by it: packing has to be worth it.
  void assign(const Tensor& matrix, int64_t left_rows) {
    constexpr int64_t kFewestRows = 64;
    matrix_ = matrix;
    const bool contiguous = matrix.stride(0) == 1 || matrix.stride(1) == 1;
    is_packed_ = matrix.scalar_type() == ScalarType::Float && contiguous &&
                 left_rows >= kFewestRows && matrix.numel() > 0 && sgemm_serves();
    if (is_packed_) packed_.pack(matrix_of(matrix));
  }

  const Tensor& matrix() const { return matrix_; }
  bool is_packed() const { return is_packed_; }
  const PackedRight& packed() const { return packed_; }

 private:
  Tensor matrix_;
  PackedRight packed_;
  bool is_packed_ = false;
};

// Products, one after the other, in the same working memory.
class Products {
 public:
  // out = a b
  void multiply(Tensor out, const Tensor& a, const RightOperand& b) {
    if (b.is_packed()) {
      sgemm(result_of(out), nullptr, matrix_of(a), b.packed(), left_);
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.matrix().get()));
    }
  }

  // out = start + a b; start may be out
  void multiply_onto(Tensor out, const Tensor& start, const Tensor& a, const RightOperand& b) {
    if (b.is_packed()) {
      const Matrix<const float> from = matrix_of(start);
      sgemm(result_of(out), &from, matrix_of(a), b.packed(), left_);
    } else {
      STABLE_TORCH_ERROR_CODE_CHECK(
          aoti_torch_cpu_addmm_out(out.get(), start.get(), a.get(), b.matrix().get(), 1.0, 1.0));
    }
  }

 private:
  static Matrix<float> result_of(Tensor& out) {
    return {out.mutable_data_ptr<float>(), out.size(0), out.size(1), out.stride(0)};
  }

  ReusedMemory<float> left_;
};

}  // namespace calm
