// Fresh memory in large pages, where the system grants them: a page fault for 2 MB and not for 4 kB.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "cpu/registration.h"

namespace calm {

// Asks for large pages under a large tensor that nothing has written yet. Only speed depends on it.
inline void prefer_large_pages(Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  constexpr uintptr_t kLargePage = uintptr_t{1} << 21;
  const auto start = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t bytes =
      static_cast<uintptr_t>(tensor.numel()) * static_cast<uintptr_t>(tensor.element_size());
  const uintptr_t first = (start + kPage - 1) / kPage * kPage;
  const uintptr_t last = (start + bytes) / kPage * kPage;
  if (bytes < 2 * kLargePage) return;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace calm
