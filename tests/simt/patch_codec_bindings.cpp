// The kernels of the patch codec on the host executor.

// First: it defines the words of CUDA C++ that the kernels use.
#include "executor.h"

#include <optional>

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/patch_codec_kernel.cuh"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// Rows as bytes, so that 16-bit floats need no NumPy type.
using Bytes = Array<uint8_t>;

constexpr uint8_t kUnwritten = 0x7f;  // a NaN-like pattern in every dtype

template <size_t kBytes>
struct alignas(kBytes) Unit {
  uint8_t bytes[kBytes];
};

Bytes rows_of(py::ssize_t rows, py::ssize_t row_bytes, uint8_t fill) {
  Bytes array({rows, row_bytes});
  std::fill_n(array.mutable_data(), array.size(), fill);
  return array;
}

template <typename T>
const T* typed(const Bytes& bytes) {
  return reinterpret_cast<const T*>(bytes.data());
}
template <typename T>
T* typed(Bytes& bytes) {
  return reinterpret_cast<T*>(bytes.mutable_data());
}

// (flat, used ids)
template <typename Id, size_t kUnitBytes>
py::tuple embed_with(const Array<Id>& ids, const Bytes& table, float dropout,
                     std::optional<int64_t> seed, unsigned blocks, uint64_t order) {
  Bytes flat = rows_of(ids.size(), table.shape(1), kUnwritten);
  Array<int64_t> used({ids.shape(0), ids.shape(1)});
  std::fill_n(used.mutable_data(), used.size(), -77);
  const calm::EmbedArguments<Id> arguments{ids.data(),
                                           ids.size(),
                                           ids.shape(1),
                                           table.shape(0),
                                           table.shape(1) / static_cast<int64_t>(kUnitBytes),
                                           {seed ? &*seed : nullptr, dropout},
                                           used.mutable_data()};
  const auto* from = typed<Unit<kUnitBytes>>(table);
  auto* to = typed<Unit<kUnitBytes>>(flat);
  simt::launch(dim3(blocks), dim3(calm::kCodecThreads), 0, simt::Options{order, 0},
               [&] { calm::embed_flatten_kernel<Unit<kUnitBytes>, Id>(from, to, arguments); });
  return py::make_tuple(flat, used);
}

template <typename Id>
py::tuple embed(const Array<Id>& ids, const Bytes& table, int unit_bytes, float dropout,
                std::optional<int64_t> seed, unsigned blocks, uint64_t order) {
  if (unit_bytes == 16) return embed_with<Id, 16>(ids, table, dropout, seed, blocks, order);
  return embed_with<Id, 2>(ids, table, dropout, seed, blocks, order);
}

template <typename T, bool kWide>
void run_gradient(const calm::EmbedGradientArguments<T>& arguments, uint64_t order, int poison) {
  constexpr int64_t kColumns = 32 * calm::Columns<T, kWide>::kCount;
  const int64_t tiles = (arguments.num_tokens + calm::kTileTokens - 1) / calm::kTileTokens;
  const auto chunks = static_cast<unsigned>((arguments.width + kColumns - 1) / kColumns);
  const auto blocks = static_cast<unsigned>((tiles + calm::kCodecWarps - 1) / calm::kCodecWarps);
  const simt::Options options{order, static_cast<unsigned char>(poison)};
  simt::launch(dim3(blocks, chunks), dim3(calm::kCodecThreads), 0, options,
               [&] { calm::embed_gradient_tile_kernel<T, kWide>(arguments); });
  simt::launch(dim3(static_cast<unsigned>(tiles), chunks), dim3(calm::kCodecThreads), 0, options,
               [&] { calm::embed_gradient_join_kernel<T, kWide>(arguments); });
}

template <typename T>
Bytes gradient(const Bytes& grad_flat, const Array<int32_t>& ids, const Array<int64_t>& tokens,
               int64_t vocab_size, bool wide, uint64_t order, int poison) {
  const int64_t width = grad_flat.shape(1) / static_cast<int64_t>(sizeof(T));
  const int64_t tiles = (ids.size() + calm::kTileTokens - 1) / calm::kTileTokens;
  std::vector<calm::Compute<T>> partial(static_cast<size_t>(2 * tiles * width), std::nanf(""));
  Bytes grad = rows_of(vocab_size, grad_flat.shape(1), 0);
  const calm::EmbedGradientArguments<T> arguments{typed<T>(grad_flat), ids.data(),    tokens.data(),
                                                  ids.size(),          vocab_size,    width,
                                                  partial.data(),      typed<T>(grad)};
  if constexpr (!std::is_same_v<T, double>) {
    if (wide) {
      run_gradient<T, true>(arguments, order, poison);
      return grad;
    }
  }
  run_gradient<T, false>(arguments, order, poison);
  return grad;
}

template <typename T, typename Id>
Bytes gather(const Array<Id>& ids, const Bytes& tables, const Bytes& bias, int64_t vocab_size,
             bool wide, unsigned blocks, uint64_t order) {
  Bytes out = rows_of(ids.shape(0), tables.shape(1), kUnwritten);
  const calm::GatherArguments<T, Id> arguments{ids.data(),
                                               typed<T>(tables),
                                               typed<T>(bias),
                                               ids.shape(0),
                                               ids.shape(1),
                                               vocab_size,
                                               tables.shape(1) / static_cast<int64_t>(sizeof(T)),
                                               typed<T>(out)};
  const auto run = [&](auto kernel) {
    simt::launch(dim3(blocks), dim3(calm::kCodecThreads), 0, simt::Options{order, 0},
                 [&] { kernel(arguments); });
  };
  if constexpr (!std::is_same_v<T, double>) {
    if (wide) {
      run([](const auto& a) { calm::gather_sum_kernel<T, true, Id>(a); });
      return out;
    }
  }
  run([](const auto& a) { calm::gather_sum_kernel<T, false, Id>(a); });
  return out;
}

template <typename T>
void bind_dtype(py::module_& m, const std::string& name) {
  m.def(("embed_gradient_" + name).c_str(), &gradient<T>);
  m.def(("gather_sum_" + name).c_str(), &gather<T, int64_t>);
  m.def(("gather_sum_" + name).c_str(), &gather<T, int32_t>);
}

}  // namespace

void bind_patch_codec(py::module_& m) {
  m.def("embed_flatten_int64", &embed<int64_t>);
  m.def("embed_flatten_int32", &embed<int32_t>);
  bind_dtype<float>(m, "float32");
  bind_dtype<double>(m, "float64");
  bind_dtype<calm::BFloat16>(m, "bfloat16");
  bind_dtype<calm::Float16>(m, "float16");
}
