// Launchers and registration of the patch codec; the device code is patch_codec_kernel.cuh.
//
// The gradient's tokens are sorted by torch: a stable sort of n 32-bit keys, without a host sync.

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>

#include "cuda/patch_codec_kernel.cuh"
#include "cuda/registration.cuh"

namespace calm {
namespace {

// Enough for every warp of the largest current chip several times over; the kernels stride.
constexpr int64_t kMaxBlocks = 1 << 16;
constexpr size_t kWideBytes = 16;

unsigned blocks_of_warps(int64_t warps) {
  return static_cast<unsigned>(std::min(kMaxBlocks, (warps + kCodecWarps - 1) / kCodecWarps));
}

// Whether rows of so many bytes at this address consist of aligned units of `unit` bytes.
bool consists_of(size_t unit, size_t row_bytes, const void* address) {
  return row_bytes % unit == 0 && reinterpret_cast<size_t>(address) % unit == 0;
}

// Calls function.template operator()<Unit>() for the largest unit that rows consist of.
template <typename Function>
void dispatch_unit(size_t element_bytes, size_t row_bytes, const void* from, const void* to,
                   const Function& function) {
  const auto fits = [&](size_t unit) {
    return consists_of(unit, row_bytes, from) && consists_of(unit, row_bytes, to);
  };
  if (fits(kWideBytes)) return function.template operator()<uint4>();
  if (fits(8)) return function.template operator()<uint2>();
  if (fits(4)) return function.template operator()<uint32_t>();
  STD_TORCH_CHECK(element_bytes == 2, "embed_flatten: unexpected dtype");
  function.template operator()<uint16_t>();
}

// Calls function.template operator()<Id>() for ids of either width.
template <typename Function>
void dispatch_ids(const Tensor& ids, const Function& function) {
  if (ids.scalar_type() == ScalarType::Long) return function.template operator()<int64_t>();
  function.template operator()<int32_t>();
}

// Calls function.template operator()<T, wide>() for a dtype and rows that may be read 16 bytes at a
// time. float64 is not: it is there to compare with.
template <typename Function>
void dispatch(ScalarType type, bool wide, const Function& function) {
  const auto either = [&]<typename T>() {
    if (wide) return function.template operator()<T, true>();
    function.template operator()<T, false>();
  };
  switch (type) {
    case ScalarType::Float:
      return either.template operator()<float>();
    case ScalarType::Double:
      return function.template operator()<double, false>();
    case ScalarType::BFloat16:
      return either.template operator()<BFloat16>();
    case ScalarType::Half:
      return either.template operator()<Float16>();
    default:
      STD_TORCH_CHECK(false, "patch_codec: unexpected dtype");
  }
}

size_t row_bytes_of(const Tensor& tensor, int64_t width) {
  return static_cast<size_t>(width) * static_cast<size_t>(tensor.element_size());
}

std::tuple<Tensor, Tensor> embed_flatten(const Tensor& ids_in, const Tensor& embedding_in,
                                         double dropout, const std::optional<Tensor>& seed) {
  const int32_t device = embedding_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor ids = torch::stable::contiguous(ids_in);
  const Tensor embedding = torch::stable::contiguous(embedding_in);
  const int64_t patch_size = ids.size(1);
  const int64_t width = embedding.size(1);
  Tensor flat = torch::stable::new_empty(embedding, {ids.size(0), patch_size * width});
  Tensor used_ids = torch::stable::new_empty(ids, {ids.size(0), patch_size}, ScalarType::Long);
  const int64_t num_tokens = ids.numel();
  if (num_tokens == 0) return {flat, used_ids};
  const size_t row_bytes = row_bytes_of(embedding, width);
  const void* table = embedding.const_data_ptr();
  void* out = flat.mutable_data_ptr();
  dispatch_ids(ids, [&]<typename Id>() {
    dispatch_unit(embedding.element_size(), row_bytes, table, out, [&]<typename Unit>() {
      const EmbedArguments<Id> arguments{
          ids.const_data_ptr<Id>(),
          num_tokens,
          patch_size,
          embedding.size(0),
          static_cast<int64_t>(row_bytes / sizeof(Unit)),
          {dropout > 0.0 && seed.has_value() ? seed->const_data_ptr<int64_t>() : nullptr,
           static_cast<float>(dropout)},
          used_ids.mutable_data_ptr<int64_t>()};
      embed_flatten_kernel<Unit, Id>
          <<<blocks_of_warps(num_tokens), kCodecThreads, 0, current_stream(device)>>>(
              static_cast<const Unit*>(table), static_cast<Unit*>(out), arguments);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {flat, used_ids};
}

// (sorted keys, where they were); equal keys stay in order.
std::tuple<Tensor, Tensor> stable_sort(const Tensor& keys) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(keys), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

template <typename T, bool kWide>
void launch_gradient(const EmbedGradientArguments<T>& arguments, cudaStream_t stream) {
  constexpr int64_t kColumns = 32 * Columns<T, kWide>::kCount;
  const int64_t tiles = (arguments.num_tokens + kTileTokens - 1) / kTileTokens;
  const auto chunks = static_cast<unsigned>((arguments.width + kColumns - 1) / kColumns);
  const auto blocks = static_cast<unsigned>((tiles + kCodecWarps - 1) / kCodecWarps);
  embed_gradient_tile_kernel<T, kWide>
      <<<dim3(blocks, chunks), kCodecThreads, 0, stream>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  embed_gradient_join_kernel<T, kWide>
      <<<dim3(static_cast<unsigned>(tiles), chunks), kCodecThreads, 0, stream>>>(arguments);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor embed_flatten_backward(const Tensor& grad_flat_in, const Tensor& used_ids_in,
                              int64_t vocab_size) {
  const int32_t device = grad_flat_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  const Tensor grad_flat = torch::stable::contiguous(grad_flat_in);
  const int64_t num_tokens = used_ids_in.numel();
  const int64_t width = grad_flat.size(1) / used_ids_in.size(1);
  STD_TORCH_CHECK(vocab_size <= std::numeric_limits<int32_t>::max(),
                  "embed_flatten: expected a vocabulary of at most 2^31 - 1; got ", vocab_size);
  Tensor grad = torch::stable::new_empty(grad_flat, {vocab_size, width});
  const size_t row_bytes = row_bytes_of(grad_flat, width);
  STD_CUDA_CHECK(cudaMemsetAsync(grad.mutable_data_ptr(), 0,
                                 static_cast<size_t>(vocab_size) * row_bytes, stream));
  if (num_tokens == 0) return grad;
  Tensor keys = torch::stable::new_empty(used_ids_in, {num_tokens}, ScalarType::Int);
  torch::stable::copy_(keys, torch::stable::flatten(used_ids_in));
  const auto [ids, tokens] = stable_sort(keys);
  const int64_t tiles = (num_tokens + kTileTokens - 1) / kTileTokens;
  const bool is_double = grad_flat.scalar_type() == ScalarType::Double;
  Tensor partial = torch::stable::new_empty(grad_flat, {tiles, 2, width},
                                            is_double ? ScalarType::Double : ScalarType::Float);
  const bool wide = consists_of(kWideBytes, row_bytes, grad_flat.const_data_ptr()) &&
                    consists_of(kWideBytes, row_bytes, grad.const_data_ptr());
  dispatch(grad_flat.scalar_type(), wide, [&]<typename T, bool kWide>() {
    const EmbedGradientArguments<T> arguments{static_cast<const T*>(grad_flat.const_data_ptr()),
                                              ids.template const_data_ptr<int32_t>(),
                                              tokens.template const_data_ptr<int64_t>(),
                                              num_tokens,
                                              vocab_size,
                                              width,
                                              static_cast<Compute<T>*>(partial.mutable_data_ptr()),
                                              static_cast<T*>(grad.mutable_data_ptr())};
    launch_gradient<T, kWide>(arguments, stream);
  });
  return grad;
}

Tensor folded_squeezed_gather(const Tensor& ids_in, const Tensor& tables_in,
                              const Tensor& bias_in) {
  const int32_t device = tables_in.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor ids = torch::stable::contiguous(ids_in);
  const Tensor tables = torch::stable::contiguous(tables_in);
  const Tensor bias = torch::stable::contiguous(bias_in);
  const int64_t num_patches = ids.size(0);
  const int64_t width = tables.size(2);
  Tensor out = torch::stable::new_empty(tables, {num_patches, width});
  if (num_patches == 0) return out;
  const size_t row_bytes = row_bytes_of(tables, width);
  const bool wide = consists_of(kWideBytes, row_bytes, tables.const_data_ptr()) &&
                    consists_of(kWideBytes, row_bytes, bias.const_data_ptr());
  dispatch_ids(ids, [&]<typename Id>() {
    dispatch(tables.scalar_type(), wide, [&]<typename T, bool kWide>() {
      const GatherArguments<T, Id> arguments{ids.const_data_ptr<Id>(),
                                             static_cast<const T*>(tables.const_data_ptr()),
                                             static_cast<const T*>(bias.const_data_ptr()),
                                             num_patches,
                                             ids.size(1),
                                             tables.size(1),
                                             width,
                                             static_cast<T*>(out.mutable_data_ptr())};
      gather_sum_kernel<T, kWide, Id>
          <<<blocks_of_warps(num_patches), kCodecThreads, 0, current_stream(device)>>>(arguments);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CUDA, m) {
  m.impl("embed_flatten", TORCH_BOX(&calm::embed_flatten));
  m.impl("embed_flatten_backward", TORCH_BOX(&calm::embed_flatten_backward));
  m.impl("folded_squeezed_gather", TORCH_BOX(&calm::folded_squeezed_gather));
}
