// The kernels of the gated feed-forward block on the host executor. 16-bit values come and go as
// NumPy uint16.

// First: it defines the words of CUDA C++ that the kernels use.
#include "executor.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "cuda/gated_ffn_kernel.cuh"

namespace py = pybind11;

namespace {

template <typename In>
struct NumpyType {
  using type = In;
};
template <>
struct NumpyType<calm::BFloat16> {
  using type = uint16_t;
};
template <>
struct NumpyType<calm::Float16> {
  using type = uint16_t;
};

template <typename In>
using Array = py::array_t<typename NumpyType<In>::type, py::array::c_style>;

template <typename In>
const In* input(const Array<In>& array) {
  return reinterpret_cast<const In*>(array.data());
}

template <typename In>
In* output(Array<In>& array) {
  return reinterpret_cast<In*>(array.mutable_data());
}

// Filled with NaN: all bits set.
template <typename In>
Array<In> unwritten(std::vector<py::ssize_t> shape) {
  Array<In> array(std::move(shape));
  std::memset(array.mutable_data(), 0xff, static_cast<size_t>(array.nbytes()));
  return array;
}

template <typename In>
Array<In> copied(const Array<In>& array) {
  Array<In> copy(std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()));
  std::memcpy(copy.mutable_data(), array.data(), static_cast<size_t>(array.nbytes()));
  return copy;
}

struct How {
  unsigned blocks;
  uint64_t order;
  int poison;
};

// kernel.template operator()<kCount>() in every thread; 16 bytes at a time where rows allow it.
template <typename In, typename Kernel>
void launch(int64_t size, size_t shared_bytes, const How& how, const Kernel& kernel) {
  const auto run = [&](const std::function<void()>& body) {
    simt::launch(dim3(how.blocks), dim3(calm::kFfnThreads), shared_bytes,
                 simt::Options{how.order, static_cast<unsigned char>(how.poison)}, body);
  };
  if (size % calm::kFfnVector<In> == 0) {
    run([&] { kernel.template operator()<calm::kFfnVector<In>>(); });
  } else {
    run([&] { kernel.template operator()<1>(); });
  }
}

// (normed, rstd)
template <typename In>
py::tuple rms_norm(const Array<In>& x, const Array<In>& weight,
                   const std::optional<Array<calm::Compute<In>>>& rstd_in, double eps,
                   unsigned blocks, uint64_t order, int poison) {
  using T = calm::Compute<In>;
  const int64_t num_rows = x.shape(0);
  const int64_t size = x.shape(1);
  Array<In> normed = unwritten<In>({num_rows, size});
  Array<T> rstd = rstd_in ? copied<T>(*rstd_in) : unwritten<T>({num_rows});
  const calm::RmsNormArguments<In> arguments{
      input<In>(x), input<In>(weight),  output<In>(normed), output<T>(rstd), num_rows, size,
      eps,          rstd_in.has_value()};
  launch<In>(size, 0, How{blocks, order, poison},
             [&]<int kCount>() { calm::rms_norm_kernel<In, kCount>(arguments); });
  return py::make_tuple(normed, rstd);
}

template <typename In>
Array<In> swiglu(const Array<In>& gate_up, unsigned blocks, uint64_t order, int poison) {
  const int64_t num_rows = gate_up.shape(0);
  const int64_t size = gate_up.shape(1) / 2;
  Array<In> product = unwritten<In>({num_rows, size});
  const calm::SwigluArguments<In> arguments{input<In>(gate_up), output<In>(product), nullptr,
                                            num_rows, size};
  launch<In>(size, 0, How{blocks, order, poison},
             [&]<int kCount>() { calm::swiglu_kernel<In, kCount>(arguments); });
  return product;
}

// (product, grad_gate_up)
template <typename In>
py::tuple swiglu_backward(const Array<In>& gate_up, const Array<In>& grad_product, unsigned blocks,
                          uint64_t order, int poison) {
  const int64_t num_rows = gate_up.shape(0);
  const int64_t size = gate_up.shape(1) / 2;
  Array<In> product = copied<In>(grad_product);
  Array<In> grads = unwritten<In>({num_rows, 2 * size});
  const calm::SwigluArguments<In> arguments{input<In>(gate_up), output<In>(product),
                                            output<In>(grads), num_rows, size};
  launch<In>(size, 0, How{blocks, order, poison},
             [&]<int kCount>() { calm::swiglu_backward_kernel<In, kCount>(arguments); });
  return py::make_tuple(product, grads);
}

// (grad_x, grad_norm_weight); in place without a separate gradient, no residual where it is empty
template <typename In>
py::tuple rms_norm_backward(const Array<In>& x, const Array<In>& weight,
                            const Array<calm::Compute<In>>& rstd, const Array<In>& grad_out,
                            const Array<In>& grad_normed, bool in_shared, unsigned blocks,
                            uint64_t order, int poison) {
  using T = calm::Compute<In>;
  const int64_t size = x.shape(1);
  const int64_t line_size = size % calm::kFfnVector<In> == 0
                                ? calm::ffn_line_size<calm::kFfnVector<In>>(size)
                                : calm::ffn_line_size<1>(size);
  const int64_t numbers = calm::kFfnWarpsPerBlock * line_size;
  Array<In> grad_x = copied<In>(grad_normed);
  Array<T> partial = unwritten<T>({static_cast<py::ssize_t>(blocks), size});
  Array<T> lines = unwritten<T>({in_shared ? 0 : static_cast<py::ssize_t>(blocks), numbers});
  Array<In> grad_weight = unwritten<In>({size});
  const bool residual = grad_out.size() != 0;
  const calm::RmsNormBackwardArguments<In> arguments{
      input<In>(x),
      input<In>(weight),
      input<T>(rstd),
      residual ? input<In>(grad_x) : input<In>(grad_normed),
      residual ? input<In>(grad_out) : nullptr,
      output<In>(grad_x),
      output<T>(partial),
      in_shared ? nullptr : output<T>(lines),
      x.shape(0),
      size};
  launch<In>(size, in_shared ? static_cast<size_t>(numbers) * sizeof(T) : 0,
             How{blocks, order, poison},
             [&]<int kCount>() { calm::rms_norm_backward_kernel<In, kCount>(arguments); });
  simt::launch(dim3(static_cast<unsigned>((size + 31) / 32)), dim3(calm::kFfnThreads), 0,
               simt::Options{order, static_cast<unsigned char>(poison)}, [&] {
                 calm::column_sum_kernel<In>(arguments.partial, output<In>(grad_weight), blocks,
                                             size);
               });
  return py::make_tuple(grad_x, grad_weight);
}

template <typename In>
void bind(py::module_& m, const std::string& dtype) {
  m.def(("ffn_rms_norm_" + dtype).c_str(), &rms_norm<In>);
  m.def(("ffn_swiglu_" + dtype).c_str(), &swiglu<In>);
  m.def(("ffn_swiglu_backward_" + dtype).c_str(), &swiglu_backward<In>);
  m.def(("ffn_rms_norm_backward_" + dtype).c_str(), &rms_norm_backward<In>);
}

}  // namespace

void bind_gated_ffn(py::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  bind<calm::BFloat16>(m, "bfloat16");
  bind<calm::Float16>(m, "float16");
}
