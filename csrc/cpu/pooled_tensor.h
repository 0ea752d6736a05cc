// Results in memory that is used again: activations and gradients live from one step to the next
// but for a moment, and pages that the system takes back and hands out afresh cost time.
#pragma once

#include <initializer_list>

#include "cpu/registration.h"

namespace calm {

// As new_empty, dense and not to be resized. What 256 kB to 64 MB take up goes back to a pool when
// the tensor is gone, of which the process keeps up to 256 MB; the rest, and all memory under
// torch 2.10, is torch's.
Tensor pooled_empty(const Tensor& like, std::initializer_list<int64_t> sizes);

}  // namespace calm
