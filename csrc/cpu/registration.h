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

// One binary for all x86-64 CPUs: the loader picks the widest clone that the machine runs.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(CALM_NO_MULTIVERSION)
#define CALM_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CALM_MULTIVERSION
#endif
