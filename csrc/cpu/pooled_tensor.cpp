#include "cpu/pooled_tensor.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <utility>
#include <vector>

#include <torch/csrc/stable/device.h>

#include "cpu/large_pages.h"
#include "cpu/workspace.h"

// Torch exports this from 2.11 on; the library is built for 2.10 and looks.
#if defined(__linux__) && TORCH_FEATURE_VERSION < TORCH_VERSION_2_11_0
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* result,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);
#define CALM_POOLS_TENSORS 1
#endif

namespace calm {
namespace {

#ifdef CALM_POOLS_TENSORS

constexpr size_t kFewestBytes = size_t{256} << 10;
constexpr size_t kMostBytes = size_t{64} << 20;
constexpr size_t kMostFreeBytes = size_t{256} << 20;
constexpr size_t kLargePage = size_t{2} << 20;
constexpr size_t kSmallUnit = size_t{64} << 10;

size_t rounded(size_t bytes) {
  const size_t unit = bytes < kLargePage ? kSmallUnit : kLargePage;
  return (bytes + unit - 1) / unit * unit;
}

class Pool {
 public:
  // Memory of rounded(bytes), or null.
  void* take(size_t bytes) {
    const size_t size = rounded(bytes);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      // The last one that came is the likeliest to be in cache.
      const auto found = std::find_if(free_.rbegin(), free_.rend(),
                                      [&](const Block& block) { return block.bytes == size; });
      if (found != free_.rend()) {
        void* const data = found->data;
        free_.erase(std::next(found).base());
        free_bytes_ -= size;
        return data;
      }
    }
    void* const data = std::aligned_alloc(size < kLargePage ? kSmallUnit : kLargePage, size);
    if (data != nullptr) use_large_pages(data, size);
    return data;
  }

  void give(void* data, size_t bytes) {
    const size_t size = rounded(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back({data, size});
    free_bytes_ += size;
    while (free_bytes_ > kMostFreeBytes) {
      free_bytes_ -= free_.front().bytes;
      std::free(free_.front().data);
      free_.erase(free_.begin());
    }
  }

  int64_t empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Block& block : free_) std::free(block.data);
    free_.clear();
    return static_cast<int64_t>(std::exchange(free_bytes_, 0));
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  std::mutex mutex_;
  std::vector<Block> free_;
  size_t free_bytes_ = 0;
};

// Never destroyed: tensors may outlive everything.
Pool& pool() {
  static Pool& pool = *new Pool();
  return pool;
}

void give_back(void* data, void* context) { pool().give(data, reinterpret_cast<size_t>(context)); }

#endif

// What is kept for the next calls, given back: the pool's memory and this thread's workspaces.
int64_t empty_cache() {
  int64_t bytes = 0;
  for (const auto release : workspace_releases()) bytes += release();
#ifdef CALM_POOLS_TENSORS
  bytes += pool().empty();
#endif
  return bytes;
}

}  // namespace

Tensor pooled_empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
#ifdef CALM_POOLS_TENSORS
  size_t bytes = like.element_size();
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  void* data = nullptr;
  if (bytes >= kFewestBytes && bytes <= kMostBytes && torch_from_blob != nullptr) {
    data = pool().take(bytes);
  }
  if (data != nullptr) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) {
      strides[i - 1] = strides[i] * std::data(sizes)[i];
    }
    int32_t dtype = 0;
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
        data, static_cast<int64_t>(sizes.size()), std::data(sizes), strides.data(), 0, dtype,
        aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(), nullptr, 0,
        give_back, reinterpret_cast<void*>(bytes)));
    return Tensor(handle);
  }
#endif
  Tensor result = torch::stable::new_empty(like, sizes);
  use_large_pages(result);
  return result;
}

}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CompositeExplicitAutograd, m) {
  m.impl("empty_cache", TORCH_BOX(&calm::empty_cache));
}
