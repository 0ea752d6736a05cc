// Launcher and registration of the energy score. The kernels are energy_score_closed_form.cuh,
// energy_score_targets.cuh and energy_score_block.cuh; energy_score_plan.cuh chooses.

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/dtype_dispatch.cuh"
#include "cuda/energy_score_launch.cuh"
#include "cuda/registration.cuh"

namespace calm {
namespace {

template <typename In>
Rows<In> rows_of(const Tensor& tensor) {
  const bool has_rows = tensor.dim() == 3;
  return {static_cast<const In*>(tensor.const_data_ptr()), has_rows ? tensor.stride(0) : 0,
          tensor.stride(has_rows ? 1 : 0), tensor.stride(has_rows ? 2 : 1)};
}

Tensor gradient_like(const Tensor& tensor, bool needed) {
  if (!needed) return torch::stable::new_empty(tensor, {0});
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return torch::stable::new_empty(tensor, sizes);
}

template <typename In>
In* gradient_pointer(const Tensor& gradient, bool needed) {
  return needed ? static_cast<In*>(gradient.mutable_data_ptr()) : nullptr;
}

Tensor score_like(const Tensor& samples) {
  return torch::stable::new_empty(
      samples, {samples.size(1)},
      samples.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

// What depends on alpha alone takes some microseconds: kept from call to call.
template <typename T>
const PowerConstants<T>& cached_constants(double alpha) {
  thread_local double cached_alpha = 0.0;
  thread_local PowerConstants<T> constants{};
  if (cached_alpha != alpha) {
    constants = power_constants<T>(alpha);
    cached_alpha = alpha;
  }
  return constants;
}

// Arguments that both operators share.
template <typename In>
EnergyArguments<In> common_arguments(const Tensor& samples, int64_t num_targets, double alpha,
                                     const Tensor& score) {
  using T = Compute<In>;
  EnergyArguments<In> arguments{};
  arguments.shape = {samples.size(0), samples.size(1), samples.size(2), num_targets};
  arguments.samples = rows_of<In>(samples);
  arguments.score = static_cast<T*>(score.mutable_data_ptr());
  arguments.constants = cached_constants<T>(alpha);
  const auto count = static_cast<double>(arguments.shape.num_samples);
  arguments.pair_weight = static_cast<T>(2.0 / (count * (count - 1.0)));
  arguments.target_weight =
      static_cast<T>(-2.0 / (count * static_cast<double>(std::max<int64_t>(num_targets, 1))));
  return arguments;
}

template <typename In>
void run(EnergyArguments<In>& arguments, const Tensor& samples, int32_t device) {
  if (arguments.shape.num_positions == 0) return;
  const EnergyPlan plan = plan_energy_score(arguments, true);
  STD_TORCH_CHECK(plan.shared_bytes <= kMostSharedBytes,
                  "energy_score: ", arguments.shape.num_samples, " samples of ",
                  arguments.shape.size,
                  " dimensions do not fit the CUDA kernel (64 of 4096 do); use backend "
                  "'reference'");
  std::optional<Tensor> workspace;
  if (plan.workspace != 0) {
    workspace = torch::stable::new_empty(samples, {plan.workspace}, ScalarType::Float);
    arguments.workspace = static_cast<Compute<In>*>(workspace->mutable_data_ptr());
  }
  STD_CUDA_CHECK(launch_energy_score(arguments, plan, current_stream(device)));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> energy_score(const Tensor& samples, const Tensor& mean,
                                                        const Tensor& log_std,
                                                        const std::optional<Tensor>& seed,
                                                        double alpha, const std::string& estimator,
                                                        int64_t num_targets, bool needs_samples,
                                                        bool needs_mean, bool needs_log_std) {
  const int32_t device = samples.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const bool drawn = estimator == "monte_carlo";
  STD_TORCH_CHECK(!drawn || seed.has_value(), "energy_score: monte_carlo needs a seed");
  const Tensor score = score_like(samples);
  const Tensor grad_samples = gradient_like(samples, needs_samples);
  const Tensor grad_mean = gradient_like(mean, needs_mean);
  const Tensor grad_log_std = gradient_like(log_std, needs_log_std);
  dispatch_floating(samples.scalar_type(), [&]<typename In>() {
    auto arguments = common_arguments<In>(samples, drawn ? num_targets : 0, alpha, score);
    arguments.mean = rows_of<In>(mean);
    arguments.log_std = rows_of<In>(log_std);
    if (drawn) arguments.seed = seed->const_data_ptr<int64_t>();
    arguments.grad_samples = gradient_pointer<In>(grad_samples, needs_samples);
    arguments.grad_mean = gradient_pointer<In>(grad_mean, needs_mean);
    arguments.grad_log_std = gradient_pointer<In>(grad_log_std, needs_log_std);
    run(arguments, samples, device);
  });
  return {score, grad_samples, grad_mean, grad_log_std};
}

std::tuple<Tensor, Tensor, Tensor> energy_score_from_targets(const Tensor& samples,
                                                             const Tensor& targets, double alpha,
                                                             bool needs_samples,
                                                             bool needs_targets) {
  const int32_t device = samples.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor score = score_like(samples);
  const Tensor grad_samples = gradient_like(samples, needs_samples);
  const Tensor grad_targets = gradient_like(targets, needs_targets);
  dispatch_floating(samples.scalar_type(), [&]<typename In>() {
    auto arguments = common_arguments<In>(samples, targets.size(0), alpha, score);
    arguments.targets = rows_of<In>(targets);
    arguments.grad_samples = gradient_pointer<In>(grad_samples, needs_samples);
    arguments.grad_targets = gradient_pointer<In>(grad_targets, needs_targets);
    run(arguments, samples, device);
  });
  return {score, grad_samples, grad_targets};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CUDA, m) {
  m.impl("energy_score", TORCH_BOX(&calm::energy_score));
  m.impl("energy_score_from_targets", TORCH_BOX(&calm::energy_score_from_targets));
}
