// Exposes the CUDA kernels, run by the host executor, to pytest as functions of NumPy arrays.

// First: it defines the words of CUDA C++ that the kernels use.
#include "executor.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cuda/brier_kernel.cuh"
#include "cuda/random_kernel.cuh"
#include "self_test_kernels.h"

namespace py = pybind11;

void bind_energy_head(py::module_& m);
void bind_energy_score(py::module_& m);
void bind_temperature_sampling(py::module_& m);
void bind_patch_codec(py::module_& m);
void bind_gated_ffn(py::module_& m);

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

simt::Options options(uint64_t seed, int poison) {
  return simt::Options{seed, static_cast<unsigned char>(poison)};
}

// Scores, hit rates and pair rates.
template <typename Id>
std::vector<Array<float>> brier(const Array<Id>& samples, const Array<Id>& target,
                                int64_t num_ngrams, unsigned blocks, uint64_t seed, int poison) {
  const calm::BrierShape shape{samples.shape(0), samples.shape(1), samples.shape(2), num_ngrams};
  std::vector<Array<float>> out;
  for (int i = 0; i < 3; ++i) {
    Array<float>& result =
        out.emplace_back(std::vector<py::ssize_t>{shape.num_positions, shape.num_ngrams});
    std::fill_n(result.mutable_data(), result.size(), std::nanf(""));
  }
  const Id* sample_ids = samples.data();
  const Id* target_ids = target.data();
  const size_t shared_bytes = static_cast<size_t>(2 * num_ngrams * calm::kBrierWarpsPerBlock) * 8;
  const calm::BrierResults wanted[] = {
      {out[0].mutable_data(), nullptr, nullptr},
      {nullptr, out[1].mutable_data(), out[2].mutable_data()},
  };
  for (const calm::BrierResults& results : wanted) {
    simt::launch(dim3(blocks), dim3(calm::kBrierWarpsPerBlock * 32), shared_bytes,
                 options(seed, poison),
                 [&] { calm::brier_kernel<Id>(sample_ids, target_ids, results, shape); });
  }
  return out;
}

template <bool kNormal>
Array<float> philox(int64_t seed, const Array<int64_t>& rows, int64_t count, int64_t first,
                    uint32_t stream, unsigned blocks, uint64_t order) {
  const calm::RandomShape shape{rows.size(), count, first};
  Array<float> values({shape.num_rows, count});
  std::fill_n(values.mutable_data(), values.size(), std::nanf(""));
  const int64_t* row = rows.data();
  float* out = values.mutable_data();
  simt::launch(dim3(blocks), dim3(calm::kRandomThreads), 0, options(order, 0),
               [&] { calm::random_kernel<kNormal>(&seed, row, out, shape, stream); });
  return values;
}

Array<float> self_test_sum(const Array<float>& values, const std::string& kind, uint64_t seed) {
  const py::ssize_t blocks = values.size() / simt_self_test::kBlock;
  Array<float> sums(blocks);
  std::fill_n(sums.mutable_data(), blocks, 0.0f);
  const float* in = values.data();
  float* out = sums.mutable_data();
  simt::launch(dim3(static_cast<unsigned>(blocks)), dim3(simt_self_test::kBlock), 0,
               options(seed, 0xa5), [&] {
                 if (kind == "warp") {
                   simt_self_test::warp_sum(in, out);
                 } else {
                   simt_self_test::block_sum(in, out, kind == "block");
                 }
               });
  return sums;
}

float self_test_fault(const std::string& kind, int poison) {
  float out = 0.0f;
  simt::launch(dim3(1), dim3(simt_self_test::kBlock), 16, options(0, poison), [&] {
    if (kind == "read_before_write") simt_self_test::read_before_write(&out);
    if (kind == "divergent_barrier") simt_self_test::divergent_barrier();
    if (kind == "out_of_bounds") simt_self_test::out_of_bounds(&out);
  });
  return out;
}

}  // namespace

PYBIND11_MODULE(calm_simt, m) {
  m.doc() = "CUDA kernels of calm_kernels on the host executor";
  m.def("brier", &brier<int64_t>);
  m.def("brier", &brier<int32_t>);
  m.def("philox_uniform", &philox<false>);
  m.def("philox_normal", &philox<true>);
  bind_energy_head(m);
  bind_energy_score(m);
  bind_temperature_sampling(m);
  bind_patch_codec(m);
  bind_gated_ffn(m);
  m.def("self_test_sum", &self_test_sum);
  m.def("self_test_fault", &self_test_fault);
}
