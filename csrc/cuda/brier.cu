// Launcher and registration of the Brier U-statistic; the device code is brier_kernel.cuh.

#include <algorithm>
#include <tuple>

#include "cuda/brier_kernel.cuh"
#include "cuda/registration.cuh"

namespace calm {
namespace {

// Enough blocks for every warp of the largest current chip several times over; the kernel strides.
constexpr int64_t kMaxBlocks = 1 << 16;

BrierShape shape_of(const Tensor& samples, int64_t max_ngram) {
  const int64_t patch_size = samples.size(2);
  return {samples.size(0), samples.size(1), patch_size, std::min(patch_size, max_ngram)};
}

Tensor empty_results(const Tensor& samples, const BrierShape& shape) {
  return torch::stable::new_empty(samples, {shape.num_positions, shape.num_ngrams},
                                  ScalarType::Float);
}

void launch(const Tensor& samples_in, const Tensor& target_in, const BrierResults& results,
            const BrierShape& shape) {
  if (shape.num_positions == 0) return;
  const Tensor samples = torch::stable::contiguous(samples_in);
  const Tensor target = torch::stable::contiguous(target_in);
  const int64_t blocks =
      std::min(kMaxBlocks, (shape.num_positions + kBrierWarpsPerBlock - 1) / kBrierWarpsPerBlock);
  const size_t shared_bytes =
      static_cast<size_t>(2 * shape.num_ngrams * kBrierWarpsPerBlock) * sizeof(int64_t);
  const auto stream = current_stream(samples.get_device_index());
  const auto run = [&]<typename Id>(const Id* sample_ids) {
    brier_kernel<Id>
        <<<static_cast<unsigned>(blocks), kBrierWarpsPerBlock * 32, shared_bytes, stream>>>(
            sample_ids, target.const_data_ptr<Id>(), results, shape);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (samples.scalar_type() == ScalarType::Long) {
    run(samples.const_data_ptr<int64_t>());
  } else {
    run(samples.const_data_ptr<int32_t>());
  }
}

Tensor brier_scores(const Tensor& samples, const Tensor& target, int64_t max_ngram) {
  const torch::stable::accelerator::DeviceGuard guard(samples.get_device_index());
  const BrierShape shape = shape_of(samples, max_ngram);
  Tensor scores = empty_results(samples, shape);
  launch(samples, target, {scores.mutable_data_ptr<float>(), nullptr, nullptr}, shape);
  return scores;
}

std::tuple<Tensor, Tensor> brier_rates(const Tensor& samples, const Tensor& target,
                                       int64_t max_ngram) {
  const torch::stable::accelerator::DeviceGuard guard(samples.get_device_index());
  const BrierShape shape = shape_of(samples, max_ngram);
  Tensor hits = empty_results(samples, shape);
  Tensor pairs = empty_results(samples, shape);
  launch(samples, target,
         {nullptr, hits.mutable_data_ptr<float>(), pairs.mutable_data_ptr<float>()}, shape);
  return {hits, pairs};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CUDA, m) {
  m.impl("brier_scores", TORCH_BOX(&calm::brier_scores));
  m.impl("brier_rates", TORCH_BOX(&calm::brier_rates));
}
