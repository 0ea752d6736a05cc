// Torch's matrix product of parts of buffers, and the tasks that call it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/device.h>
#include <torch/headeronly/core/DeviceType.h>

#include "cpu/large_pages.h"
#include "cpu/registration.h"

namespace calm {

// Row i and column j at data[i * row_stride + j * column_stride].
template <typename T>
struct Matrix {
  T* data;
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride = 1;

  Matrix transposed() const { return {data, columns, rows, column_stride, row_stride}; }
  Matrix<const T> read_only() const { return {data, rows, columns, row_stride, column_stride}; }
};

template <typename T>
constexpr ScalarType scalar_type_of() {
  return sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
Tensor view_of(const Matrix<T>& matrix) {
  using Element = std::remove_const_t<T>;
  return torch::stable::from_blob(const_cast<Element*>(matrix.data), {matrix.rows, matrix.columns},
                                  {matrix.row_stride, matrix.column_stride},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  scalar_type_of<Element>());
}

// out = a b, or out += a b.
template <typename T>
void multiply(const Matrix<T>& out, const Matrix<const T>& a, const Matrix<const T>& b,
              bool accumulate) {
  Tensor result = view_of(out);
  const Tensor left = view_of(a);
  const Tensor right = view_of(b);
  if (accumulate) {
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(result.get(), result.get(), left.get(), right.get(), 1.0, 1.0));
  } else {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(result.get(), left.get(), right.get()));
  }
}

// f(begin, end) over [0, count) inside a parallel region even if there is one task: a matrix
// product called there stays on its thread, so results do not depend on the number of threads.
template <typename F>
void for_tasks(int64_t count, const F& f) {
  torch::stable::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t begin, int64_t end) {
    if (begin < count) f(begin, std::min(end, count));
  });
}

// Uninitialised working memory on a 64-byte boundary.
template <typename T>
class WorkingMemory {
 public:
  explicit WorkingMemory(int64_t count) {
    constexpr size_t kAlignment = 64;
    constexpr size_t kLargePage = size_t{1} << 21;
    const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T);
    const size_t unit = bytes >= kLargePage ? kLargePage : kAlignment;
    data_.reset(static_cast<T*>(std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit)));
    if (data_ == nullptr) throw std::bad_alloc();
    use_large_pages(data_.get(), bytes);
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
};

// Working memory that is kept from use to use and grows where one needs more.
template <typename T>
class ReusedMemory {
 public:
  T* at_least(int64_t count) {
    if (count > count_) {
      memory_.emplace(count);
      count_ = count;
    }
    return memory_ ? memory_->get() : nullptr;
  }
  T* get() const { return memory_ ? memory_->get() : nullptr; }
  int64_t bytes() const { return count_ * static_cast<int64_t>(sizeof(T)); }
  void release() {
    memory_.reset();
    count_ = 0;
  }

 private:
  std::optional<WorkingMemory<T>> memory_;
  int64_t count_ = 0;
};

}  // namespace calm
