// What every CPU kernel file includes: the stable tensor API and the shared pool.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace calm {

using Tensor = torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

}  // namespace calm
