// The kernels of the energy head on the host executor.

// First: it defines the words of CUDA C++ that the kernels use.
#include "executor.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>
#include <string>

#include "cuda/energy_head_kernel.cuh"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// How NumPy sees a storage type: 16-bit floats as their bits.
template <typename S>
struct InNumpy {
  using type = S;
};
template <>
struct InNumpy<calm::BFloat16> {
  using type = uint16_t;
};
template <>
struct InNumpy<calm::Float16> {
  using type = uint16_t;
};

template <typename S>
class Kernels {
  using T = calm::Compute<S>;
  using N = typename InNumpy<S>::type;
  using In = const Array<N>&;

 public:
  Kernels(unsigned blocks, uint64_t seed, int poison)
      : blocks_(blocks), options_{seed, static_cast<unsigned char>(poison)} {}

  // (normed, mean, rstd)
  py::tuple layer_norm(In x, In weight, In bias, double eps) const {
    Array<N> normed = like(x);
    Array<T> mean(x.shape(0)), rstd(x.shape(0));
    run([&, in = read(x), w = read(weight), b = read(bias), out = write(normed),
         m = mean.mutable_data(), s = rstd.mutable_data(), rows = x.shape(0),
         size = x.shape(1)] { calm::layer_norm_kernel<S>(in, w, b, out, m, s, rows, size, eps); });
    return py::make_tuple(normed, mean, rstd);
  }

  Array<N> layer_norm_backward(In x, In weight, const Array<T>& mean, const Array<T>& rstd,
                               In grad_normed, In grad_out) const {
    Array<N> grad = like(x);
    run([&, in = read(x), w = read(weight), m = mean.data(), s = rstd.data(), g = read(grad_normed),
         passed = read(grad_out), out = write(grad), rows = x.shape(0), size = x.shape(1)] {
      calm::layer_norm_backward_kernel<S>(in, w, m, s, g, passed, out, rows, size);
    });
    return grad;
  }

  // (x + shared, activated); no shared rows where it is empty
  py::tuple silu(In x, In shared, int64_t num_samples) const {
    Array<N> sum = copy(x), activated = like(x);
    const S* rows_shared = shared.size() == 0 ? nullptr : read(shared);
    run([&, in = write(sum), out = write(activated), rows = x.shape(0), size = x.shape(1)] {
      calm::silu_kernel<S>(in, rows_shared, out, rows, num_samples, size);
    });
    return py::make_tuple(sum, activated);
  }

  // (gradient, activated)
  py::tuple silu_backward(In x, In grad_in) const {
    Array<N> grad = copy(grad_in), activated = like(x);
    run([&, in = read(x), g = write(grad), out = write(activated), count = x.size()] {
      calm::silu_backward_kernel<S>(in, g, out, count);
    });
    return py::make_tuple(grad, activated);
  }

  // (product, out)
  py::tuple gated(In gate_up, In x, In bias) const {
    Array<N> product = like(x), out = like(x);
    run([&, pair = read(gate_up), in = read(x), b = read(bias), p = write(product), o = write(out),
         rows = x.shape(0),
         size = x.shape(1)] { calm::gated_kernel<S>(pair, in, b, p, o, rows, size); });
    return py::make_tuple(product, out);
  }

  // (product, gradient of gate_up)
  py::tuple gated_backward(In gate_up, In grad_product) const {
    Array<N> product = copy(grad_product), grad = like(gate_up);
    run([&, pair = read(gate_up), p = write(product), g = write(grad), rows = grad_product.shape(0),
         size = grad_product.shape(1)] { calm::gated_backward_kernel<S>(pair, p, g, rows, size); });
    return py::make_tuple(product, grad);
  }

  Array<N> sample_sum(In rows, int64_t num_samples) const {
    Array<N> sum({rows.shape(0) / num_samples, rows.shape(1)});
    run([&, in = read(rows), out = write(sum), positions = rows.shape(0) / num_samples,
         size = rows.shape(1)] {
      calm::sample_sum_kernel<S>(in, out, positions, num_samples, size);
    });
    return sum;
  }

  // (sum over rows, sum of values * unit row)
  py::tuple column_sums(In values, In x, const Array<T>& mean, const Array<T>& rstd) const {
    const int64_t rows = values.shape(0);
    const int64_t size = values.shape(1);
    const int64_t stretches = (rows + calm::kHeadSumRows - 1) / calm::kHeadSumRows;
    Array<T> partial({stretches, size}), by_unit({stretches, size});
    Array<N> sum(size), sum_by_unit(size);
    const calm::ColumnSums<S> sums{
        read(values),           read(x), mean.data(), rstd.data(), partial.mutable_data(),
        by_unit.mutable_data(), rows,    size};
    run([&] { calm::column_sums_kernel<S>(sums); });
    run([&, out = write(sum)] { calm::finish_sums_kernel<S>(sums.partial, out, stretches, size); });
    run([&, out = write(sum_by_unit)] {
      calm::finish_sums_kernel<S>(sums.partial_by_unit, out, stretches, size);
    });
    return py::make_tuple(sum, sum_by_unit);
  }

 private:
  static const S* read(In array) { return reinterpret_cast<const S*>(array.data()); }
  static S* write(Array<N>& array) { return reinterpret_cast<S*>(array.mutable_data()); }

  static Array<N> like(In array) {
    Array<N> result({array.shape(0), array.shape(1)});
    std::memset(result.mutable_data(), 0xff, static_cast<size_t>(result.nbytes()));  // NaN
    return result;
  }

  static Array<N> copy(In array) {
    Array<N> result = like(array);
    std::memcpy(result.mutable_data(), array.data(), static_cast<size_t>(array.nbytes()));
    return result;
  }

  template <typename Kernel>
  void run(const Kernel& kernel) const {
    simt::launch(dim3(blocks_), dim3(calm::kHeadThreads), 0, options_, kernel);
  }

  unsigned blocks_;
  simt::Options options_;
};

template <typename S>
void bind(py::module_& m, const char* name) {
  py::class_<Kernels<S>>(m, name)
      .def(py::init<unsigned, uint64_t, int>())
      .def("layer_norm", &Kernels<S>::layer_norm)
      .def("layer_norm_backward", &Kernels<S>::layer_norm_backward)
      .def("silu", &Kernels<S>::silu)
      .def("silu_backward", &Kernels<S>::silu_backward)
      .def("gated", &Kernels<S>::gated)
      .def("gated_backward", &Kernels<S>::gated_backward)
      .def("sample_sum", &Kernels<S>::sample_sum)
      .def("column_sums", &Kernels<S>::column_sums);
}

}  // namespace

void bind_energy_head(py::module_& m) {
  bind<float>(m, "EnergyHeadFloat");
  bind<double>(m, "EnergyHeadDouble");
  bind<calm::BFloat16>(m, "EnergyHeadBFloat16");
  bind<calm::Float16>(m, "EnergyHeadFloat16");
}
