// Gradients of weights as products summed over blocks of rows.
#pragma once

#include "cpu/matmul_into.h"

namespace calm {

// Sums a^T b. Where this library multiplies, a sum is two: of the lower and the upper half of every
// block's rows (cpu/sgemm.h), the upper ones to be added in the end.
class WeightSums {
 public:
  // `packs`: this library multiplies, all of them. `packed` and `left` are working memory.
  WeightSums(bool packs, PackedRight& packed, ReusedMemory<float>& left)
      : packs_(packs), packed_(packed), left_(left) {}

  bool packs() const { return packs_; }

  // The rows b for products with columns of a, `columns` of them; until the next is packed.
  RightOperand pack(const Tensor& b, int64_t columns) {
    if (!packs_) return RightOperand(b, columns, packed_);
    packed_.pack_in_two(matrix_of(b));
    return RightOperand(packed_);
  }

  // sum (and its upper half) = a^T b, or that added to it.
  void accumulate(Tensor sum, const Tensor& upper, bool starts, const Tensor& a,
                  const RightOperand& b) {
    if (packs_) {
      multiply_in_two(sum, upper, !starts, transposed(a), *b.packed(), left_);
    } else if (starts) {
      multiply(sum, transposed(a), b, left_);
    } else {
      multiply_onto(sum, sum, transposed(a), b, left_);
    }
  }

 private:
  bool packs_;
  PackedRight& packed_;
  ReusedMemory<float>& left_;
};

}  // namespace calm
