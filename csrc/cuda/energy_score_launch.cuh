// Launches the energy score's kernels. Included by one .cu a dtype, which instantiate
// launch_energy_score: they compile beside one another, and without torch's headers.
#pragma once

#include <cuda_runtime.h>

#include "cuda/energy_score_plan.cuh"

namespace calm {

template <typename In>
cudaError_t launch_energy_score(const EnergyArguments<In>& arguments, const EnergyPlan& plan,
                                cudaStream_t stream);

#ifdef CALM_ENERGY_SCORE_LAUNCHER

constexpr int64_t kSharedBytesWithoutAsking = 48 * 1024;

// Lets a kernel use the plan's shared memory and launches it.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const EnergyPlan& plan, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (plan.shared_bytes > kSharedBytesWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(plan.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<plan.blocks, plan.threads, static_cast<size_t>(plan.shared_bytes), stream>>>(
      arguments...);
  return cudaGetLastError();
}

template <typename In>
cudaError_t launch_energy_score(const EnergyArguments<In>& arguments, const EnergyPlan& plan,
                                cudaStream_t stream) {
  if constexpr (sizeof(In) <= sizeof(float)) {
    if (plan.kernel != EnergyKernel::kBlock) {
      return with_samples(arguments.shape.num_samples, [&]<int kSamples>() {
        const auto kernel = plan.kernel == EnergyKernel::kTargets
                                ? targets_kernel<In, kSamples>
                                : closed_form_kernel<In, kSamples>;
        return launch(kernel, plan, stream, arguments, plan.log2_width);
      });
    }
  }
  return launch(block_kernel<In>, plan, stream, arguments, plan.layout, plan.log2_width);
}

#endif  // CALM_ENERGY_SCORE_LAUNCHER

}  // namespace calm
