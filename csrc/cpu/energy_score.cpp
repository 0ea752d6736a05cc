// The energy score and its gradients on CPUs: positions over torch's pool, rows through a working
// buffer of one position. The arithmetic is energy_score_position.cpp.
//
// Fewest bytes: samples, mean and log_std (or targets) read once, scores and requested gradients
// written once. Monte Carlo targets are made 64 numbers at a time and never leave the cache, so
// memory does not grow with their number.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/dtype_dispatch.h"
#include "cpu/energy_score_position.h"
#include "cpu/registration.h"

namespace calm {
namespace {

constexpr int64_t kAlignment = 64;
// Positions per task at least: one is some microseconds of work.
constexpr int64_t kGrain = 4;

template <typename In>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

template <typename T>
class AlignedBuffer {
 public:
  explicit AlignedBuffer(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(kAlignment, round_up(count)))), count_(count) {
    if (data_ == nullptr) throw std::bad_alloc();
    clear();
  }
  T* get() { return data_.get(); }
  void clear() { std::fill_n(data_.get(), count_, T(0)); }

 private:
  static size_t round_up(int64_t count) {
    const size_t bytes = static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(T);
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T[], Free> data_;
  int64_t count_;
};

// Where row (n, p) of a [N, P, D] (or [P, D]) tensor starts; any strides.
template <typename In>
struct Rows {
  In* data;
  int64_t row_stride;       // over n
  int64_t position_stride;  // over p
  int64_t element_stride;   // over d

  In* row(int64_t n, int64_t p) const { return data + n * row_stride + p * position_stride; }
};

template <typename In>
Rows<const In> rows_of(const Tensor& tensor) {
  const bool has_rows = tensor.dim() == 3;
  return {tensor.const_data_ptr<In>(), has_rows ? tensor.stride(0) : 0,
          tensor.stride(has_rows ? 1 : 0), tensor.stride(has_rows ? 2 : 1)};
}

// Gradients are made here, dense.
template <typename In>
Rows<In> writable_rows_of(Tensor& tensor, int64_t num_positions, int64_t size) {
  return {tensor.mutable_data_ptr<In>(), num_positions * size, size, 1};
}

template <typename In, typename T>
void load(const Rows<const In>& rows, int64_t n, int64_t p, int64_t size, T* out) {
  const In* row = rows.row(n, p);
  for (int64_t d = 0; d < size; ++d) out[d] = static_cast<T>(row[d * rows.element_stride]);
}

template <typename In, typename T>
void store(const T* values, const Rows<In>& rows, int64_t n, int64_t p, int64_t size) {
  In* row = rows.row(n, p);
  for (int64_t d = 0; d < size; ++d) row[d] = static_cast<In>(values[d]);
}

Tensor gradient_like(const Tensor& tensor, bool needed) {
  if (!needed) return torch::stable::new_empty(tensor, {0});
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes.push_back(tensor.size(i));
  return torch::stable::new_empty(tensor, sizes);
}

Tensor score_like(const Tensor& samples) {
  return torch::stable::new_empty(
      samples, {samples.size(1)},
      samples.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
}

struct Shape {
  int64_t num_samples;
  int64_t num_positions;
  int64_t size;

  template <typename T>
  int64_t padded() const {
    constexpr int64_t kLanes = kAlignment / static_cast<int64_t>(sizeof(T));
    return (size + kLanes - 1) / kLanes * kLanes;
  }
};

Shape shape_of(const Tensor& samples) {
  return {samples.size(0), samples.size(1), samples.size(2)};
}

// Working memory of one thread for the parts that every form has.
template <typename T>
struct Workspace {
  Workspace(const Shape& shape, bool needs_samples)
      : padded(shape.padded<T>()),
        samples(shape.num_samples * padded),
        grad_samples(needs_samples ? shape.num_samples * padded : 0),
        pair_weights(shape.num_samples * shape.num_samples),
        scratch(4 * padded) {}

  EnergyPosition<T> position(const Shape& shape, bool needs_samples) {
    return {shape.num_samples,
            shape.size,
            padded,
            samples.get(),
            nullptr,
            nullptr,
            needs_samples ? grad_samples.get() : nullptr,
            nullptr,
            nullptr,
            pair_weights.get(),
            scratch.get()};
  }

  int64_t padded;
  AlignedBuffer<T> samples;
  AlignedBuffer<T> grad_samples;
  AlignedBuffer<T> pair_weights;
  AlignedBuffer<T> scratch;
};

template <typename In, typename T>
void load_samples(const Rows<const In>& rows, int64_t p, const Shape& shape, Workspace<T>& work) {
  for (int64_t n = 0; n < shape.num_samples; ++n) {
    load(rows, n, p, shape.size, work.samples.get() + n * work.padded);
  }
}

template <typename In, typename T>
void store_sample_gradients(Workspace<T>& work, const Rows<In>& rows, int64_t p,
                            const Shape& shape) {
  for (int64_t n = 0; n < shape.num_samples; ++n) {
    store(work.grad_samples.get() + n * work.padded, rows, n, p, shape.size);
  }
}

// Targets drawn together: the fewest whose numbers are whole groups of 64.
int64_t targets_per_chunk(int64_t size) { return 64 / std::gcd<int64_t>(size, 64); }

struct GaussianGradients {
  Tensor samples;
  Tensor mean;
  Tensor log_std;
  bool needs_samples;
  bool needs_mean;
  bool needs_log_std;
};

template <typename T>
T monte_carlo_term(const EnergyPosition<T>& position, const PowerConstants<T>& constants,
                   int64_t num_targets, uint64_t seed, uint64_t row, AlignedBuffer<T>& noise,
                   AlignedBuffer<T>& targets, AlignedBuffer<T>& grad_targets) {
  const bool needs_targets = position.grad_mean != nullptr || position.grad_log_std != nullptr;
  const int64_t chunk = targets_per_chunk(position.size);
  const int64_t groups = chunk * position.size / 64;
  const T weight = T(-2) / static_cast<T>(position.num_samples * num_targets);
  T total = 0;
  for (int64_t first = 0; first < num_targets; first += chunk) {
    const int64_t count = std::min(chunk, num_targets - first);
    energy_normals(seed, row, first / chunk * groups, groups, noise.get());
    for (int64_t m = 0; m < count; ++m) {
      T* target = targets.get() + m * position.padded;
      const T* eps = noise.get() + m * position.size;
      for (int64_t d = 0; d < position.size; ++d) {
        target[d] = position.mean[d] + position.std[d] * eps[d];
      }
    }
    if (needs_targets) grad_targets.clear();
    total += add_target_term(position, constants, targets.get(), count, weight,
                             needs_targets ? grad_targets.get() : nullptr);
    if (!needs_targets) continue;
    for (int64_t m = 0; m < count; ++m) {
      const T* grad = grad_targets.get() + m * position.padded;
      const T* eps = noise.get() + m * position.size;
      for (int64_t d = 0; d < position.size; ++d) {
        if (position.grad_mean != nullptr) position.grad_mean[d] += grad[d];
        if (position.grad_log_std != nullptr) {
          position.grad_log_std[d] += grad[d] * (position.std[d] * eps[d]);
        }
      }
    }
  }
  return total;
}

template <typename In>
void gaussian(const Tensor& samples, const Tensor& mean, const Tensor& log_std,
              std::optional<uint64_t> seed, double alpha, int64_t num_targets, Tensor& score,
              GaussianGradients& gradients) {
  using T = typename ComputeType<In>::type;
  const Shape shape = shape_of(samples);
  const PowerConstants<T> constants = power_constants<T>(alpha);
  const auto sample_rows = rows_of<In>(samples);
  const auto mean_rows = rows_of<In>(mean);
  const auto log_std_rows = rows_of<In>(log_std);
  const auto grad_samples =
      writable_rows_of<In>(gradients.samples, shape.num_positions, shape.size);
  const auto grad_mean = writable_rows_of<In>(gradients.mean, shape.num_positions, shape.size);
  const auto grad_log_std =
      writable_rows_of<In>(gradients.log_std, shape.num_positions, shape.size);
  T* scores = score.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, shape.num_positions, kGrain, [&](int64_t begin, int64_t end) {
    Workspace<T> work(shape, gradients.needs_samples);
    const int64_t chunk = seed ? targets_per_chunk(shape.size) : 0;
    AlignedBuffer<T> law(4 * work.padded);
    AlignedBuffer<T> noise(chunk * shape.size);
    AlignedBuffer<T> targets(chunk * work.padded);
    AlignedBuffer<T> grad_targets(chunk * work.padded);
    T* const mean_row = law.get();
    T* const std_row = law.get() + work.padded;
    T* const grad_mean_row = law.get() + 2 * work.padded;
    T* const grad_log_std_row = law.get() + 3 * work.padded;
    EnergyPosition<T> position = work.position(shape, gradients.needs_samples);
    position.mean = mean_row;
    position.std = std_row;
    position.grad_mean = gradients.needs_mean ? grad_mean_row : nullptr;
    position.grad_log_std = gradients.needs_log_std ? grad_log_std_row : nullptr;
    for (int64_t p = begin; p < end; ++p) {
      load_samples(sample_rows, p, shape, work);
      load(mean_rows, 0, p, shape.size, mean_row);
      load(log_std_rows, 0, p, shape.size, std_row);
      for (int64_t d = 0; d < shape.size; ++d) std_row[d] = std::exp(std_row[d]);
      work.grad_samples.clear();
      std::fill_n(grad_mean_row, 2 * work.padded, T(0));
      T total = add_pair_term(position, constants);
      if (seed) {
        total += monte_carlo_term(position, constants, num_targets, *seed, static_cast<uint64_t>(p),
                                  noise, targets, grad_targets);
      } else {
        total += add_closed_form_term(position, constants);
      }
      scores[p] = total;
      if (gradients.needs_samples) store_sample_gradients(work, grad_samples, p, shape);
      if (gradients.needs_mean) store(grad_mean_row, grad_mean, 0, p, shape.size);
      if (gradients.needs_log_std) store(grad_log_std_row, grad_log_std, 0, p, shape.size);
    }
  });
}

template <typename In>
void from_targets(const Tensor& samples, const Tensor& targets, double alpha, bool needs_samples,
                  bool needs_targets, Tensor& score, Tensor& grad_samples, Tensor& grad_targets) {
  using T = typename ComputeType<In>::type;
  const Shape shape = shape_of(samples);
  const int64_t num_targets = targets.size(0);
  const PowerConstants<T> constants = power_constants<T>(alpha);
  const T weight = T(-2) / static_cast<T>(shape.num_samples * num_targets);
  const auto sample_rows = rows_of<In>(samples);
  const auto target_rows = rows_of<In>(targets);
  const auto grad_sample_rows = writable_rows_of<In>(grad_samples, shape.num_positions, shape.size);
  const auto grad_target_rows = writable_rows_of<In>(grad_targets, shape.num_positions, shape.size);
  T* scores = score.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, shape.num_positions, kGrain, [&](int64_t begin, int64_t end) {
    Workspace<T> work(shape, needs_samples);
    AlignedBuffer<T> target(work.padded);
    AlignedBuffer<T> grad_target(work.padded);
    const EnergyPosition<T> position = work.position(shape, needs_samples);
    for (int64_t p = begin; p < end; ++p) {
      load_samples(sample_rows, p, shape, work);
      work.grad_samples.clear();
      T total = add_pair_term(position, constants);
      for (int64_t m = 0; m < num_targets; ++m) {
        load(target_rows, m, p, shape.size, target.get());
        if (needs_targets) grad_target.clear();
        total += add_target_term(position, constants, target.get(), 1, weight,
                                 needs_targets ? grad_target.get() : nullptr);
        if (needs_targets) store(grad_target.get(), grad_target_rows, m, p, shape.size);
      }
      scores[p] = total;
      if (needs_samples) store_sample_gradients(work, grad_sample_rows, p, shape);
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> energy_score(const Tensor& samples, const Tensor& mean,
                                                        const Tensor& log_std,
                                                        const std::optional<Tensor>& seed,
                                                        double alpha, const std::string& estimator,
                                                        int64_t num_targets, bool needs_samples,
                                                        bool needs_mean, bool needs_log_std) {
  Tensor score = score_like(samples);
  GaussianGradients gradients{gradient_like(samples, needs_samples),
                              gradient_like(mean, needs_mean),
                              gradient_like(log_std, needs_log_std),
                              needs_samples,
                              needs_mean,
                              needs_log_std};
  std::optional<uint64_t> key;
  if (estimator == "monte_carlo") {
    STD_TORCH_CHECK(seed.has_value(), "energy_score: monte_carlo needs a seed");
    key = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  }
  dispatch_floating(samples.scalar_type(), [&]<typename In>() {
    gaussian<In>(samples, mean, log_std, key, alpha, num_targets, score, gradients);
  });
  return {score, gradients.samples, gradients.mean, gradients.log_std};
}

std::tuple<Tensor, Tensor, Tensor> energy_score_from_targets(const Tensor& samples,
                                                             const Tensor& targets, double alpha,
                                                             bool needs_samples,
                                                             bool needs_targets) {
  Tensor score = score_like(samples);
  Tensor grad_samples = gradient_like(samples, needs_samples);
  Tensor grad_targets = gradient_like(targets, needs_targets);
  dispatch_floating(samples.scalar_type(), [&]<typename In>() {
    from_targets<In>(samples, targets, alpha, needs_samples, needs_targets, score, grad_samples,
                     grad_targets);
  });
  return {score, grad_samples, grad_targets};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("energy_score", TORCH_BOX(&calm::energy_score));
  m.impl("energy_score_from_targets", TORCH_BOX(&calm::energy_score_from_targets));
}
