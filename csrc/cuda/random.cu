// Launchers and registration of the Philox operators; the device code is random_kernel.cuh.

#include <algorithm>

#include "cuda/random_kernel.cuh"
#include "cuda/registration.cuh"

namespace calm {
namespace {

constexpr int64_t kMaxBlocks = 1 << 16;

template <bool kNormal>
Tensor fill_rows(const Tensor& seed, const Tensor& rows_in, int64_t count, int64_t stream,
                 int64_t first) {
  const int32_t device = rows_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor rows = torch::stable::contiguous(rows_in);
  const RandomShape shape{rows.size(0), count, first};
  Tensor out = torch::stable::new_empty(rows, {shape.num_rows, count}, ScalarType::Float);
  if (shape.num_rows == 0 || count == 0) return out;
  const int64_t threads = shape.num_rows * ((first + count + 3) / 4 - first / 4);
  const int64_t blocks = std::min(kMaxBlocks, (threads + kRandomThreads - 1) / kRandomThreads);
  random_kernel<kNormal>
      <<<static_cast<unsigned>(blocks), kRandomThreads, 0, current_stream(device)>>>(
          seed.const_data_ptr<int64_t>(), rows.const_data_ptr<int64_t>(),
          out.mutable_data_ptr<float>(), shape, static_cast<uint32_t>(stream));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CUDA, m) {
  m.impl("philox_uniform", TORCH_BOX(&calm::fill_rows<false>));
  m.impl("philox_normal", TORCH_BOX(&calm::fill_rows<true>));
}
