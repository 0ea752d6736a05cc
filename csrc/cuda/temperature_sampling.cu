// Launchers and registration of temperature sampling; the device code, its mapping and costs are in
// temperature_sampling_kernel.cuh. One launch a call and no host synchronisation.

#include "cuda/registration.cuh"
#include "cuda/temperature_sampling_kernel.cuh"

namespace calm {
namespace {

// A kernel has to ask for more shared memory than this.
constexpr int64_t kBytesWithoutAsking = 48 * 1024;

// Strided draws are read where they are, as long as the ids of a patch are neighbours.
Tensor with_neighbouring_ids(const Tensor& tokens) {
  const bool neighbours = tokens.size(2) == 1 || tokens.stride(2) == 1;
  return neighbours ? tokens : torch::stable::contiguous(tokens);
}

template <typename Id>
Draws<Id> draws_of(const Tensor& tokens) {
  return {tokens.const_data_ptr<Id>(),
          tokens.stride(0),
          tokens.stride(1),
          tokens.size(0),
          tokens.size(1),
          tokens.size(2)};
}

template <typename Id>
void launch_vote(const VoteArguments<Id>& arguments, cudaStream_t stream) {
  const VoteLayout layout(arguments.draws.num_draws);
  if (layout.bytes > kBytesWithoutAsking) {
    STD_CUDA_CHECK(cudaFuncSetAttribute(vote_kernel<Id>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(layout.bytes)));
  }
  vote_kernel<Id><<<static_cast<unsigned>(arguments.draws.num_sequences), kVoteThreads,
                    static_cast<size_t>(layout.bytes), stream>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<Tensor, Tensor, Tensor> batch_temperature_sample(const Tensor& tokens_in,
                                                            const Tensor& exponent_in,
                                                            const std::optional<Tensor>& rows_in,
                                                            const Tensor& seed) {
  const int32_t device = tokens_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor tokens = with_neighbouring_ids(tokens_in);
  const Tensor exponent = torch::stable::contiguous(exponent_in);
  const Tensor rows = rows_in ? torch::stable::contiguous(*rows_in) : Tensor();
  const int64_t num_sequences = tokens.size(0);
  STD_TORCH_CHECK(tokens.size(1) <= kVoteMostDraws, "batch_temperature_sample: expected at most ",
                  kVoteMostDraws, " draws a sequence on CUDA; got ", tokens.size(1),
                  "; use backend 'reference'");
  Tensor patches = torch::stable::new_empty(tokens, {num_sequences, tokens.size(2)});
  Tensor count = torch::stable::new_empty(tokens, {num_sequences}, ScalarType::Long);
  Tensor num_distinct = torch::stable::new_empty(tokens, {num_sequences}, ScalarType::Long);
  if (num_sequences == 0) return {patches, count, num_distinct};
  const auto run = [&]<typename Id>(Id* chosen) {
    launch_vote(
        VoteArguments<Id>{draws_of<Id>(tokens), exponent.const_data_ptr<double>(),
                          rows_in ? rows.const_data_ptr<int64_t>() : nullptr,
                          seed.const_data_ptr<int64_t>(), chosen, count.mutable_data_ptr<int64_t>(),
                          num_distinct.mutable_data_ptr<int64_t>()},
        current_stream(device));
  };
  if (tokens.scalar_type() == ScalarType::Long) {
    run(patches.mutable_data_ptr<int64_t>());
  } else {
    run(patches.mutable_data_ptr<int32_t>());
  }
  return {patches, count, num_distinct};
}

std::tuple<Tensor, Tensor> exact_temperature_step(const Tensor& draws_in,
                                                  const Tensor& candidate_in,
                                                  const Tensor& progress_in,
                                                  const Tensor& num_equal_in,
                                                  const Tensor& fraction_in, const Tensor& rows_in,
                                                  const Tensor& seed, int64_t max_draws) {
  const int32_t device = draws_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor tokens = with_neighbouring_ids(draws_in);
  const Tensor candidate = torch::stable::contiguous(candidate_in);
  const Tensor progress = torch::stable::contiguous(progress_in);
  const Tensor num_equal = torch::stable::contiguous(num_equal_in);
  const Tensor fraction = torch::stable::contiguous(fraction_in);
  const Tensor rows = torch::stable::contiguous(rows_in);
  const int64_t num_sequences = tokens.size(0);
  Tensor candidate_out = torch::stable::new_empty(tokens, {num_sequences, tokens.size(2)});
  Tensor progress_out =
      torch::stable::new_empty(tokens, {num_sequences, kExactColumns}, ScalarType::Long);
  if (num_sequences == 0) return {candidate_out, progress_out};
  const auto run = [&]<typename Id>(Id* out) {
    const ExactArguments<Id> arguments{draws_of<Id>(tokens),
                                       candidate.const_data_ptr<Id>(),
                                       progress.const_data_ptr<int64_t>(),
                                       num_equal.const_data_ptr<int64_t>(),
                                       fraction.const_data_ptr<double>(),
                                       rows.const_data_ptr<int64_t>(),
                                       seed.const_data_ptr<int64_t>(),
                                       max_draws,
                                       out,
                                       progress_out.mutable_data_ptr<int64_t>()};
    const int64_t blocks = (num_sequences + kExactWarpsPerBlock - 1) / kExactWarpsPerBlock;
    exact_kernel<Id>
        <<<static_cast<unsigned>(blocks), kExactWarpsPerBlock * 32, 0, current_stream(device)>>>(
            arguments);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (tokens.scalar_type() == ScalarType::Long) {
    run(candidate_out.mutable_data_ptr<int64_t>());
  } else {
    run(candidate_out.mutable_data_ptr<int32_t>());
  }
  return {candidate_out, progress_out};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CUDA, m) {
  m.impl("batch_temperature_sample", TORCH_BOX(&calm::batch_temperature_sample));
  m.impl("exact_temperature_step", TORCH_BOX(&calm::exact_temperature_step));
}
