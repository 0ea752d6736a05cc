// Memory that a thread keeps from call to call: fresh pages cost a tenth of a block's time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cpu/matmul.h"
#include "cpu/registration.h"

namespace calm {

// Of every kind of workspace: a function that gives back the calling thread's, and tells its bytes.
inline std::vector<int64_t (*)()>& workspace_releases() {
  static auto& releases = *new std::vector<int64_t (*)()>();
  return releases;
}

// The calling thread's `Memory`, for the time of one call. A Memory is a struct of parts with
// `int64_t bytes() const`; more than 64 MB of it are given back.
template <typename Memory>
class Workspace {
 public:
  Workspace() { static_cast<void>(kRegistered); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (memory_.bytes() > kMostKeptBytes) memory_ = Memory();
  }
  Memory* operator->() { return &memory_; }
  Memory& operator*() { return memory_; }

  // A matrix in one part of it, of the dtype of `like`.
  Tensor matrix(ReusedMemory<std::byte>& part, const Tensor& like, int64_t num_rows, int64_t size) {
    return matrix(part, num_rows, size, like.scalar_type(),
                  static_cast<int64_t>(like.element_size()));
  }
  // A matrix of float or double.
  template <typename T>
  Tensor matrix_of(ReusedMemory<std::byte>& part, int64_t num_rows, int64_t size) {
    return matrix(part, num_rows, size, scalar_type_of<T>(), sizeof(T));
  }

 private:
  static constexpr int64_t kMostKeptBytes = int64_t{64} << 20;

  static Tensor matrix(ReusedMemory<std::byte>& part, int64_t num_rows, int64_t size,
                       ScalarType dtype, int64_t item) {
    return torch::stable::from_blob(
        part.at_least(std::max<int64_t>(num_rows * size * item, 1)), {num_rows, size}, {size, 1},
        torch::stable::Device(torch::headeronly::DeviceType::CPU), dtype);
  }

  static int64_t release() {
    const int64_t bytes = thread_memory_.bytes();
    thread_memory_ = Memory();
    return bytes;
  }

  // Before anybody calls: when the library is loaded.
  inline static const bool kRegistered = (workspace_releases().push_back(&release), true);
  inline static thread_local Memory thread_memory_;
  Memory& memory_ = thread_memory_;
};

}  // namespace calm
