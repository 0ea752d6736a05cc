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
  // For sgemm_in_two.
  void pack_in_two(const Matrix<const float>& b);
  // Room for [rows, columns] for sgemm_in_two, to be filled through data() in the order of
  // energy_head_rows.h's RowTarget.
  void prepare_in_two(int64_t rows, int64_t columns);

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  // Panel of columns [32 panel, 32 panel + 32) and the rows of one step of the sum.
  float* data() { return data_.get(); }
  // Rows of a step of the sum; the last one may have fewer.
  int64_t step() const { return step_; }
  const float* panel(int64_t first_row, int64_t num_rows, int64_t panel) const;

  int64_t bytes() const { return data_.bytes(); }
  void release() { data_.release(); }

 private:
  void fill(const Matrix<const float>& b);
  void prepare(int64_t rows, int64_t columns, int64_t step);

  int64_t rows_ = 0;
  int64_t columns_ = 0;
  int64_t num_panels_ = 0;
  int64_t step_ = 1;
  ReusedMemory<float> data_;
};

// out = start + a b, with start of out's shape, or null for zero; it may be out itself. Rows or
// columns of `a` must be contiguous, rows of `out` and `start` are; a is packed into `left`. Every
// number is summed in one order, whatever the number of threads.
void sgemm(const Matrix<float>& out, const Matrix<const float>* start, const Matrix<const float>& a,
           const PackedRight& b, ReusedMemory<float>& left);

// lower + upper = a b, or what they hold and that added to it: the first and the second half of the
// sum. Of two threads, the one that made the rows of a half multiplies them too: rows are far from
// a thread that shares no cache with the one that wrote them. b is packed for it.
void sgemm_in_two(const Matrix<float>& lower, const Matrix<float>& upper, bool adds,
                  const Matrix<const float>& a, const PackedRight& b, ReusedMemory<float>& left);

}  // namespace calm
