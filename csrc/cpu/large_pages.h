// Fresh memory in large pages, where the system grants them: a page fault for 2 MB and not for 4
// kB.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>

#include "cpu/registration.h"

namespace calm {

// Asks for large pages for memory that nothing has written yet: first touches of a 16 MiB result in
// 4 KiB pages cost milliseconds. Only speed depends on it.
inline void use_large_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
  const auto start = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (start + kLargePage - 1) / kLargePage * kLargePage;
  const uintptr_t last = (start + bytes) / kLargePage * kLargePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

inline void use_large_pages(Tensor& tensor) {
  use_large_pages(tensor.mutable_data_ptr(),
                  static_cast<size_t>(tensor.numel()) * static_cast<size_t>(tensor.element_size()));
}

}  // namespace calm
