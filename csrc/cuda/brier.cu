// Launcher and registration of the Brier U-statistic; the device code is brier_kernel.cuh.

#include <algorithm>

#include "cuda/brier_kernel.cuh"
#include "cuda/registration.cuh"

namespace calm {
namespace {

// Enough blocks for every warp of the largest current chip several times over; the kernel strides.
constexpr int64_t kMaxBlocks = 1 << 16;

template <typename Id>
void launch(const Tensor& samples, const Tensor& target, Tensor& scores, const BrierShape& shape,
            cudaStream_t stream) {
  const int64_t blocks =
      std::min(kMaxBlocks, (shape.num_positions + kBrierWarpsPerBlock - 1) / kBrierWarpsPerBlock);
  const size_t shared_bytes =
      static_cast<size_t>(2 * shape.num_ngrams * kBrierWarpsPerBlock) * sizeof(int64_t);
  brier_kernel<Id>
      <<<static_cast<unsigned>(blocks), kBrierWarpsPerBlock * 32, shared_bytes, stream>>>(
          samples.const_data_ptr<Id>(), target.const_data_ptr<Id>(),
          scores.mutable_data_ptr<float>(), shape);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor brier_scores(const Tensor& samples_in, const Tensor& target_in, int64_t max_ngram) {
  const int32_t device = samples_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor samples = torch::stable::contiguous(samples_in);
  const Tensor target = torch::stable::contiguous(target_in);
  const int64_t patch_size = samples.size(2);
  const BrierShape shape{samples.size(0), samples.size(1), patch_size,
                         std::min(patch_size, max_ngram)};
  Tensor scores =
      torch::stable::new_empty(samples, {shape.num_positions, shape.num_ngrams}, ScalarType::Float);
  if (shape.num_positions == 0) return scores;
  if (samples.scalar_type() == ScalarType::Long) {
    launch<int64_t>(samples, target, scores, shape, current_stream(device));
  } else {
    launch<int32_t>(samples, target, scores, shape, current_stream(device));
  }
  return scores;
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CUDA, m) {
  m.impl("brier_scores", TORCH_BOX(&calm::brier_scores));
}
