// The energy score's kernels on the host executor. 16-bit values come and go as NumPy uint16.

// First: it defines the words of CUDA C++ that the kernels use.
#include "executor.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/energy_score_plan.cuh"

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
using Numpy = typename NumpyType<In>::type;

template <typename In>
calm::Rows<In> rows_of(const py::array& array) {
  if (!py::isinstance<py::array_t<Numpy<In>>>(array)) throw py::type_error("wrong dtype");
  const auto stride = [&](py::ssize_t axis) {
    return static_cast<int64_t>(array.strides(axis)) / static_cast<int64_t>(sizeof(In));
  };
  const bool has_rows = array.ndim() == 3;
  return {static_cast<const In*>(array.data()), has_rows ? stride(0) : 0, stride(has_rows ? 1 : 0),
          stride(has_rows ? 2 : 1)};
}

// A gradient filled with NaN (all bits set), or None.
template <typename In>
py::object gradient_like(const py::array& array, bool needed) {
  if (!needed) return py::none();
  py::array_t<Numpy<In>> gradient(
      std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()));
  std::memset(gradient.mutable_data(), 0xff, static_cast<size_t>(gradient.nbytes()));
  return gradient;
}

template <typename In>
In* pointer(const py::object& gradient) {
  if (gradient.is_none()) return nullptr;
  return static_cast<In*>(py::cast<py::array>(gradient).mutable_data());
}

struct How {
  bool allow_fast;
  unsigned most_blocks;  // 0: as many as the plan has
  uint64_t order;
  int poison;
};

template <typename In>
py::tuple run(calm::EnergyArguments<In>& arguments, const py::array& samples, double alpha,
              const How& how) {
  using T = calm::Compute<In>;
  calm::EnergyShape& shape = arguments.shape;
  shape.num_samples = samples.shape(0);
  shape.num_positions = samples.shape(1);
  shape.size = samples.shape(2);
  arguments.samples = rows_of<In>(samples);
  arguments.constants = calm::power_constants<T>(alpha);
  const double count = static_cast<double>(shape.num_samples);
  arguments.pair_weight = static_cast<T>(2.0 / (count * (count - 1.0)));
  arguments.target_weight =
      static_cast<T>(-2.0 / (count * static_cast<double>(std::max<int64_t>(shape.num_targets, 1))));
  py::array_t<T> score(static_cast<py::ssize_t>(shape.num_positions));
  std::fill_n(score.mutable_data(), score.size(), std::numeric_limits<T>::quiet_NaN());
  arguments.score = score.mutable_data();

  calm::EnergyPlan plan = calm::plan_energy_score(arguments, how.allow_fast);
  if (how.most_blocks != 0) {
    if (plan.kernel != calm::EnergyKernel::kBlock) {
      throw py::value_error("only the block kernel walks its grid");
    }
    plan.blocks = std::min(plan.blocks, how.most_blocks);
  }
  if (plan.shared_bytes > calm::kMostSharedBytes) throw py::value_error("too much shared memory");
  // Exactly as large as promised, and full of NaN.
  std::vector<T> workspace(static_cast<size_t>(plan.workspace),
                           std::numeric_limits<T>::quiet_NaN());
  arguments.workspace = workspace.empty() ? nullptr : workspace.data();
  const auto launch = [&](const auto& kernel) {
    simt::launch(dim3(plan.blocks), dim3(plan.threads), static_cast<size_t>(plan.shared_bytes),
                 simt::Options{how.order, static_cast<unsigned char>(how.poison)}, kernel);
  };
  const int log2_width = plan.log2_width;
  const char* kernel = "block";
  if constexpr (sizeof(In) <= sizeof(float)) {
    if (plan.kernel != calm::EnergyKernel::kBlock) {
      const bool closed_form = plan.kernel == calm::EnergyKernel::kClosedForm;
      kernel = closed_form ? "closed_form" : "targets";
      calm::with_samples(shape.num_samples, [&]<int kSamples>() {
        if (closed_form) {
          launch([&] { calm::closed_form_kernel<In, kSamples>(arguments, log2_width); });
        } else {
          launch([&] { calm::targets_kernel<In, kSamples>(arguments, log2_width); });
        }
      });
    }
  }
  if (plan.kernel == calm::EnergyKernel::kBlock) {
    launch([&] { calm::block_kernel<In>(arguments, plan.layout, log2_width); });
  }
  return py::make_tuple(score, kernel);
}

// (score, kernel's name, grad_samples, grad_mean, grad_log_std); the seed is None for the closed
// form.
template <typename In>
py::tuple energy_score(const py::array& samples, const py::array& mean, const py::array& log_std,
                       std::optional<int64_t> seed, double alpha, int64_t num_targets,
                       std::tuple<bool, bool, bool> needs, bool allow_fast, unsigned most_blocks,
                       uint64_t order, int poison) {
  calm::EnergyArguments<In> arguments{};
  arguments.mean = rows_of<In>(mean);
  arguments.log_std = rows_of<In>(log_std);
  arguments.shape.num_targets = seed ? num_targets : 0;
  arguments.seed = seed ? &*seed : nullptr;
  const py::object grad_samples = gradient_like<In>(samples, std::get<0>(needs));
  const py::object grad_mean = gradient_like<In>(mean, std::get<1>(needs));
  const py::object grad_log_std = gradient_like<In>(log_std, std::get<2>(needs));
  arguments.grad_samples = pointer<In>(grad_samples);
  arguments.grad_mean = pointer<In>(grad_mean);
  arguments.grad_log_std = pointer<In>(grad_log_std);
  const py::tuple result =
      run(arguments, samples, alpha, How{allow_fast, most_blocks, order, poison});
  return py::make_tuple(result[0], result[1], grad_samples, grad_mean, grad_log_std);
}

// (score, kernel's name, grad_samples, grad_targets)
template <typename In>
py::tuple energy_score_from_targets(const py::array& samples, const py::array& targets,
                                    double alpha, std::tuple<bool, bool> needs, bool allow_fast,
                                    unsigned most_blocks, uint64_t order, int poison) {
  calm::EnergyArguments<In> arguments{};
  arguments.targets = rows_of<In>(targets);
  arguments.shape.num_targets = targets.shape(0);
  const py::object grad_samples = gradient_like<In>(samples, std::get<0>(needs));
  const py::object grad_targets = gradient_like<In>(targets, std::get<1>(needs));
  arguments.grad_samples = pointer<In>(grad_samples);
  arguments.grad_targets = pointer<In>(grad_targets);
  const py::tuple result =
      run(arguments, samples, alpha, How{allow_fast, most_blocks, order, poison});
  return py::make_tuple(result[0], result[1], grad_samples, grad_targets);
}

template <typename In>
void bind(py::module_& m, const std::string& dtype) {
  using namespace py::literals;
  m.def(("energy_score_" + dtype).c_str(), &energy_score<In>, "samples"_a, "mean"_a, "log_std"_a,
        "seed"_a, "alpha"_a, "num_targets"_a, "needs"_a, "allow_fast"_a = true, "most_blocks"_a = 0,
        "order"_a = 0, "poison"_a = 0xff);
  m.def(("energy_score_from_targets_" + dtype).c_str(), &energy_score_from_targets<In>, "samples"_a,
        "targets"_a, "alpha"_a, "needs"_a, "allow_fast"_a = true, "most_blocks"_a = 0,
        "order"_a = 0, "poison"_a = 0xff);
}

}  // namespace

void bind_energy_score(py::module_& m) {
  bind<float>(m, "float32");
  bind<double>(m, "float64");
  bind<calm::BFloat16>(m, "bfloat16");
  bind<calm::Float16>(m, "float16");
}
