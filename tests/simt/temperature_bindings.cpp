// The kernels of temperature sampling on the host executor.

// First: it defines the words of CUDA C++ that the kernels use.
#include "executor.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda/temperature_sampling_kernel.cuh"

namespace py = pybind11;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

// What no kernel has written.
constexpr int64_t kUnwritten = -77;

// Of any strides of sequence and draw; the ids of a patch must be neighbours.
template <typename Id>
calm::Draws<Id> draws_of(const py::array_t<Id>& array) {
  const auto stride = [&](py::ssize_t axis) {
    return static_cast<int64_t>(array.strides(axis)) / static_cast<int64_t>(sizeof(Id));
  };
  if (array.size() > 0 && array.shape(2) > 1 && stride(2) != 1)
    throw py::value_error("ids are not neighbours");
  return {array.data(), stride(0), stride(1), array.shape(0), array.shape(1), array.shape(2)};
}

template <typename T>
Array<T> unwritten(std::vector<py::ssize_t> shape) {
  Array<T> array(std::move(shape));
  std::fill_n(array.mutable_data(), array.size(), static_cast<T>(kUnwritten));
  return array;
}

// (patches, count, number of distinct patches); no rows: 0, 1, 2, ...
template <typename Id>
py::tuple vote(const py::array_t<Id>& tokens, const Array<double>& exponent,
               const Array<int64_t>& rows, int64_t seed, uint64_t order, int poison) {
  const calm::Draws<Id> draws = draws_of(tokens);
  Array<Id> patches = unwritten<Id>({tokens.shape(0), tokens.shape(2)});
  Array<int64_t> count = unwritten<int64_t>({tokens.shape(0)});
  Array<int64_t> num_distinct = unwritten<int64_t>({tokens.shape(0)});
  const calm::VoteArguments<Id> arguments{draws,
                                          exponent.data(),
                                          rows.size() == 0 ? nullptr : rows.data(),
                                          &seed,
                                          patches.mutable_data(),
                                          count.mutable_data(),
                                          num_distinct.mutable_data()};
  simt::launch(dim3(static_cast<unsigned>(draws.num_sequences)), dim3(calm::kVoteThreads),
               static_cast<size_t>(calm::VoteLayout(draws.num_draws).bytes),
               simt::Options{order, static_cast<unsigned char>(poison)},
               [&] { calm::vote_kernel<Id>(arguments); });
  return py::make_tuple(patches, count, num_distinct);
}

// (candidate, progress)
template <typename Id>
py::tuple step(const py::array_t<Id>& tokens, const Array<Id>& candidate,
               const Array<int64_t>& progress, const Array<int64_t>& num_equal,
               const Array<double>& fraction, const Array<int64_t>& rows, int64_t seed,
               int64_t max_draws, uint64_t order) {
  const calm::Draws<Id> draws = draws_of(tokens);
  Array<Id> candidate_out = unwritten<Id>({tokens.shape(0), tokens.shape(2)});
  Array<int64_t> progress_out = unwritten<int64_t>({tokens.shape(0), calm::kExactColumns});
  const calm::ExactArguments<Id> arguments{draws,
                                           candidate.data(),
                                           progress.data(),
                                           num_equal.data(),
                                           fraction.data(),
                                           rows.data(),
                                           &seed,
                                           max_draws,
                                           candidate_out.mutable_data(),
                                           progress_out.mutable_data()};
  const int64_t blocks =
      (draws.num_sequences + calm::kExactWarpsPerBlock - 1) / calm::kExactWarpsPerBlock;
  simt::launch(dim3(static_cast<unsigned>(blocks)), dim3(calm::kExactWarpsPerBlock * 32), 0,
               simt::Options{order, 0}, [&] { calm::exact_kernel<Id>(arguments); });
  return py::make_tuple(candidate_out, progress_out);
}

}  // namespace

void bind_temperature_sampling(py::module_& m) {
  m.def("vote_int64", &vote<int64_t>);
  m.def("vote_int32", &vote<int32_t>);
  m.def("exact_step_int64", &step<int64_t>);
  m.def("exact_step_int32", &step<int32_t>);
  m.def("vote_shared_bytes", [](int64_t num_draws) { return calm::VoteLayout(num_draws).bytes; });
}
