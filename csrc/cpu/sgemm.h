// A float32 matrix product for CPUs with AVX-512 where torch's library does not use it.
#pragma once

#include <cstdint>

#include "cpu/matmul.h"

namespace calm {

// Whether this CPU is one where `sgemm` is the faster of the two.
bool sgemm_serves();

// A right operand [K, N] in the order in which the product reads it.
class PackedRight {
 public:
  // Rows or columns of `b` must be contiguous.
  void pack(const Matrix<const float>& b);
  // Room for [rows, columns], to be filled through data() in the order of energy_head_rows.h's
  // RowTarget.
  void prepare(int64_t rows, int64_t columns);

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  // Panel of columns [32 panel, 32 panel + 32) and the rows of one step of the sum.
  float* data() { return data_.get(); }
  // Rows of a step of the sum; the last one may have fewer.
  int64_t step() const;
  const float* panel(int64_t first_row, int64_t num_rows, int64_t panel) const;

  int64_t bytes() const { return data_.bytes(); }
  void release() { data_.release(); }

 private:
  int64_t rows_ = 0;
  int64_t columns_ = 0;
  int64_t num_panels_ = 0;
  ReusedMemory<float> data_;
};

// out = start + a b, with start of out's shape, or null for zero; it may be out itself. Rows or
// columns of `a` must be contiguous, rows of `out` and `start` are; a is packed into `left`. Every
// number is summed in one order, whatever the number of threads.
void sgemm(const Matrix<float>& out, const Matrix<const float>* start, const Matrix<const float>& a,
           const PackedRight& b, ReusedMemory<float>& left);

}  // namespace calm
