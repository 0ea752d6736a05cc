// Rows of matrices, and the tasks of a few rows that the pool takes between products.
#pragma once

#include <algorithm>

#include "cpu/registration.h"

namespace calm {

// Rows of a task: some 10 microseconds of work, and a tile of a product (cpu/sgemm.cpp).
constexpr int64_t kTaskRows = 12;

inline int64_t num_row_tasks(int64_t num_rows) { return (num_rows + kTaskRows - 1) / kTaskRows; }

// Of a dense matrix.
template <typename T>
T* row_of(Tensor& matrix, int64_t row) {
  return matrix.mutable_data_ptr<T>() + row * matrix.size(1);
}

template <typename T>
const T* row_of(const Tensor& matrix, int64_t row) {
  return matrix.const_data_ptr<T>() + row * matrix.size(1);
}

// function(first, count) for pieces of [0, num_rows) whose borders no thread count moves.
template <typename Function>
void for_row_tasks(int64_t num_rows, const Function& function) {
  torch::stable::parallel_for(0, num_row_tasks(num_rows), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kTaskRows;
      function(first, std::min(kTaskRows, num_rows - first));
    }
  });
}

}  // namespace calm
