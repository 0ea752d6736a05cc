// What every CUDA launcher includes: the stable tensor API, the current stream, launch checks.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace calm {

using Tensor = torch::stable::Tensor;
using ScalarType = torch::headeronly::ScalarType;

// torch's current stream on a device.
inline cudaStream_t current_stream(int32_t device) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                  "no current CUDA stream on device ", device);
  return static_cast<cudaStream_t>(stream);
}

}  // namespace calm
