// One kernel for every floating dtype.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/registration.h"

namespace calm {

// Calls function.template operator()<T>() for a tensor's dtype.
template <typename Function>
void dispatch_floating(ScalarType type, const Function& function) {
  switch (type) {
    case ScalarType::Float:
      return function.template operator()<float>();
    case ScalarType::Double:
      return function.template operator()<double>();
    case ScalarType::BFloat16:
      return function.template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Half:
      return function.template operator()<torch::headeronly::Half>();
    default:
      STD_TORCH_CHECK(false, "expected a floating dtype");
  }
}

}  // namespace calm
