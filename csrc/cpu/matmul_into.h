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

// Products of float32 matrices are this library's own where that is faster, others are torch's.
inline bool multiplies(const Tensor& right, int64_t left_rows) {
  // Packing has to be worth it.
  constexpr int64_t kFewestRows = 64;
  const bool contiguous = right.stride(0) == 1 || right.stride(1) == 1;
  return right.scalar_type() == ScalarType::Float && contiguous && left_rows >= kFewestRows &&
         right.numel() > 0 && sgemm_serves();
}

// The right operand of products: packed once, used by as many as there are.
class RightOperand {
 public:
  // `left_rows` will be multiplied by it; `packed` is overwritten and used until the end.
  RightOperand(const Tensor& matrix, int64_t left_rows, PackedRight& packed)
      : matrix_(matrix), packed_(multiplies(matrix, left_rows) ? &packed : nullptr) {
    if (packed_ != nullptr) packed.pack(matrix_of(matrix));
  }

  // One that was filled in packed order.
  explicit RightOperand(const PackedRight& packed) : packed_(&packed) {}

  const Tensor& matrix() const { return matrix_; }
  const PackedRight* packed() const { return packed_; }

 private:
  Tensor matrix_;
  const PackedRight* packed_;
};

// out = a b; `left` is working memory.
inline void multiply(Tensor out, const Tensor& a, const RightOperand& b,
                     ReusedMemory<float>& left) {
  if (b.packed() == nullptr) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.matrix().get()));
    return;
  }
  const Matrix<float> result{out.mutable_data_ptr<float>(), out.size(0), out.size(1),
                             out.stride(0)};
  sgemm(result, nullptr, matrix_of(a), *b.packed(), left);
}

// out = start + a b; start may be out.
inline void multiply_onto(Tensor out, const Tensor& start, const Tensor& a, const RightOperand& b,
                          ReusedMemory<float>& left) {
  if (b.packed() == nullptr) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), start.get(), a.get(), b.matrix().get(), 1.0, 1.0));
    return;
  }
  const Matrix<float> result{out.mutable_data_ptr<float>(), out.size(0), out.size(1),
                             out.stride(0)};
  const Matrix<const float> from = matrix_of(start);
  sgemm(result, &from, matrix_of(a), *b.packed(), left);
}

// lower + upper = a b, or what they hold and that added to it (cpu/sgemm.h).
inline void multiply_in_two(Tensor lower, Tensor upper, bool adds, const Tensor& a,
                            const PackedRight& b, ReusedMemory<float>& left) {
  const auto writable = [](Tensor& out) {
    return Matrix<float>{out.mutable_data_ptr<float>(), out.size(0), out.size(1), out.stride(0)};
  };
  sgemm_in_two(writable(lower), writable(upper), adds, matrix_of(a), b, left);
}

// sum += other, both float32 with contiguous rows
inline void add_onto(Tensor sum, const Tensor& other) {
  constexpr int64_t kFewestRows = 16;
  const Matrix<const float> from = matrix_of(other);
  const int64_t stride = sum.stride(0);
  float* const to = sum.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, from.rows, kFewestRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < from.columns; ++i) {
        to[row * stride + i] += from.data[row * from.row_stride + i];
      }
    }
  });
}

// out = a b with the row [N] added to every row of the result.
inline void multiply_onto_row(Tensor out, const Tensor& row, const Tensor& a, const RightOperand& b,
                              ReusedMemory<float>& left) {
  if (b.packed() == nullptr) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(out.get(), row.get(), a.get(), b.matrix().get(), 1.0, 1.0));
    return;
  }
  const Matrix<float> result{out.mutable_data_ptr<float>(), out.size(0), out.size(1),
                             out.stride(0)};
  const Matrix<const float> from{row.const_data_ptr<float>(), out.size(0), out.size(1), 0};
  sgemm(result, &from, matrix_of(a), *b.packed(), left);
}

}  // namespace calm
