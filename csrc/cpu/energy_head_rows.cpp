// The pointwise steps of the energy head in vector lanes.
//
// Each step reads and writes a row once; further passes of the norm over one row find it in L1.
// silu is within 3 ulp of the exact value. Column sums go to a row of partial sums a task, which
// stays in L1 for all rows of the task.

#include "cpu/energy_head_rows.h"

#include <algorithm>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/multiversion.h"

namespace calm {
namespace {

constexpr int64_t kSampleChain = 16;

#define CALM_STEP [&](int64_t i, auto count) __attribute__((always_inline))

template <typename T>
CALM_INLINE Vector<T> sigmoid_lanes(const Vector<T>& x) {
  return T(1) / (T(1) + exponential_lanes(-x));
}

// sum[i..] += v
template <typename T, typename Count>
CALM_INLINE void add_lanes(T* sum, const Vector<T>& v, Count count) {
  store_lanes<T>(sum, load_lanes<T>(sum, count) + v, count);
}

// Number i of a row of a target.
template <typename S>
CALM_INLINE S* place(S* row, int64_t panel_stride, int64_t i) {
  constexpr int64_t kPanel = RowTarget<S>::kPanel;
  return row + i / kPanel * panel_stride + i % kPanel;
}

template <typename S>
CALM_INLINE void run(const LayerNormRows<S>& rows) {
  using T = ComputeOf<S>;
  const T inverse_size = T(1) / static_cast<T>(rows.size);
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const S* x = rows.x + r * rows.size;
    S* normed = rows.normed.row(r);
    const int64_t panel_stride = rows.normed.panel_stride(r);
    Vector<T> total{};
    for_lanes<S>(rows.size, CALM_STEP { total += load_lanes<S>(x + i, count); });
    const T mean = sum_lanes<T>(total) * inverse_size;
    Vector<T> squares{};
    for_lanes<S>(
        rows.size, CALM_STEP {
          Vector<T> centred = load_lanes<S>(x + i, count) - mean;
          // Lanes past the end of the row hold -mean.
          if constexpr (std::is_same_v<decltype(count), int>) {
            for (int j = count; j < kRowLanes<S>; ++j) centred[j] = T(0);
          }
          squares += centred * centred;
        });
    const T variance = sum_lanes<T>(squares) * inverse_size;
    const T rstd = T(1) / std::sqrt(variance + static_cast<T>(rows.eps));
    rows.mean[r] = mean;
    rows.rstd[r] = rstd;
    for_lanes<S>(
        rows.size, CALM_STEP {
          const Vector<T> unit = (load_lanes<S>(x + i, count) - mean) * rstd;
          store_lanes<S>(
              place(normed, panel_stride, i),
              unit * load_lanes<S>(rows.weight + i, count) + load_lanes<S>(rows.bias + i, count),
              count);
        });
  }
}

template <typename S>
CALM_INLINE void run(const LayerNormBackwardRows<S>& rows) {
  using T = ComputeOf<S>;
  const T inverse_size = T(1) / static_cast<T>(rows.size);
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const S* x = rows.x + r * rows.size;
    const S* grad_out = rows.grad_out == nullptr ? nullptr : rows.grad_out + r * rows.size;
    S* grad = rows.grad_x + r * rows.size;
    const T mean = rows.mean[r];
    const T rstd = rows.rstd[r];
    Vector<T> by_one{};
    Vector<T> by_unit{};
    for_lanes<S>(
        rows.size, CALM_STEP {
          // Zero past the end, so what the other factors hold there does not matter.
          const Vector<T> g = load_lanes<S>(grad + i, count);
          const Vector<T> unit = (load_lanes<S>(x + i, count) - mean) * rstd;
          add_lanes(rows.grad_weight + i, g * unit, count);
          add_lanes(rows.grad_bias + i, g, count);
          const Vector<T> grad_unit = g * load_lanes<S>(rows.weight + i, count);
          by_one += grad_unit;
          by_unit += grad_unit * unit;
        });
    // Shifting or scaling x leaves unit unchanged: both components are taken off.
    const T shift = sum_lanes<T>(by_one) * inverse_size;
    const T scale = sum_lanes<T>(by_unit) * inverse_size;
    for_lanes<S>(
        rows.size, CALM_STEP {
          const Vector<T> grad_unit =
              load_lanes<S>(grad + i, count) * load_lanes<S>(rows.weight + i, count);
          const Vector<T> unit = (load_lanes<S>(x + i, count) - mean) * rstd;
          Vector<T> g = (grad_unit - shift - unit * scale) * rstd;
          if (grad_out != nullptr) {
            const Vector<T> passed = load_lanes<S>(grad_out + i, count);
            add_lanes(rows.grad_out_sum + i, passed, count);
            g += passed;
          }
          store_lanes<S>(grad + i, g, count);
        });
  }
}

template <typename S>
CALM_INLINE void run(const SiluRows<S>& rows) {
  using T = ComputeOf<S>;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    S* x = rows.x + r * rows.size;
    S* activated = rows.activated + r * rows.size;
    const int64_t position = (rows.first_row + r) / rows.num_samples;
    const S* shared = rows.shared == nullptr ? nullptr : rows.shared + position * rows.size;
    for_lanes<S>(
        rows.size, CALM_STEP {
          Vector<T> v = load_lanes<S>(x + i, count);
          if (shared != nullptr) {
            v += load_lanes<S>(shared + i, count);
            store_lanes<S>(x + i, v, count);
          }
          store_lanes<S>(activated + i, v * sigmoid_lanes<T>(v), count);
        });
  }
}

template <typename S>
CALM_INLINE void run(const SiluBackwardRows<S>& rows) {
  using T = ComputeOf<S>;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const S* x = rows.x + r * rows.size;
    S* grad = rows.grad + r * rows.size;
    S* activated = rows.activated.row(r);
    const int64_t panel_stride = rows.activated.panel_stride(r);
    for_lanes<S>(
        rows.size, CALM_STEP {
          const Vector<T> v = load_lanes<S>(x + i, count);
          const Vector<T> sigmoid = sigmoid_lanes<T>(v);
          const Vector<T> slope = sigmoid * (T(1) + v * (T(1) - sigmoid));
          const Vector<T> g = load_lanes<S>(grad + i, count) * slope;
          store_lanes<S>(place(activated, panel_stride, i), v * sigmoid, count);
          store_lanes<S>(grad + i, g, count);
          add_lanes(rows.grad_sum + i, g, count);
        });
  }
}

template <typename S>
CALM_INLINE void run(const GatedRows<S>& rows) {
  using T = ComputeOf<S>;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const S* gates = rows.gate_up + r * 2 * rows.size;
    const S* x = rows.x + r * rows.size;
    S* product = rows.product + r * rows.size;
    S* out = rows.out + r * rows.size;
    for_lanes<S>(
        rows.size, CALM_STEP {
          const Vector<T> gate = load_lanes<S>(gates + i, count);
          const Vector<T> up = load_lanes<S>(gates + rows.size + i, count);
          store_lanes<S>(product + i, gate * sigmoid_lanes<T>(gate) * up, count);
          store_lanes<S>(out + i, load_lanes<S>(x + i, count) + load_lanes<S>(rows.bias + i, count),
                         count);
        });
  }
}

template <typename S>
CALM_INLINE void run(const GatedBackwardRows<S>& rows) {
  using T = ComputeOf<S>;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const S* gates = rows.gate_up + r * 2 * rows.size;
    const S* grad_row = rows.grad + r * rows.size;
    S* product = rows.product.row(r);
    const int64_t panel_stride = rows.product.panel_stride(r);
    S* grads = rows.grad_gate_up + r * 2 * rows.size;
    for_lanes<S>(
        rows.size, CALM_STEP {
          const Vector<T> gate = load_lanes<S>(gates + i, count);
          const Vector<T> up = load_lanes<S>(gates + rows.size + i, count);
          const Vector<T> grad = load_lanes<S>(grad_row + i, count);
          const Vector<T> sigmoid = sigmoid_lanes<T>(gate);
          const Vector<T> activated = gate * sigmoid;
          const Vector<T> grad_gate = grad * up * (sigmoid * (T(1) + gate * (T(1) - sigmoid)));
          const Vector<T> grad_up = grad * activated;
          store_lanes<S>(place(product, panel_stride, i), activated * up, count);
          store_lanes<S>(grads + i, grad_gate, count);
          store_lanes<S>(grads + rows.size + i, grad_up, count);
          add_lanes(rows.grad_sum + i, grad_gate, count);
          add_lanes(rows.grad_sum + rows.size + i, grad_up, count);
        });
  }
}

template <typename S>
CALM_INLINE void run(const SampleSumRows<S>& rows) {
  using T = ComputeOf<S>;
  for (int64_t p = 0; p < rows.num_positions; ++p) {
    const S* first = rows.rows + p * rows.num_samples * rows.size;
    S* sum = rows.sum + p * rows.size;
    for_lanes<S>(
        rows.size, CALM_STEP {
          // Sums of sums: rounding grows with the length of a chain of additions.
          Vector<T> total{};
          for (int64_t start = 0; start < rows.num_samples; start += kSampleChain) {
            const int64_t end = std::min(start + kSampleChain, rows.num_samples);
            Vector<T> part{};
            for (int64_t n = start; n < end; ++n) {
              part += load_lanes<S>(first + n * rows.size + i, count);
            }
            total += part;
          }
          store_lanes<S>(sum + i, total, count);
        });
  }
}

template <typename S>
CALM_INLINE void run(const ColumnSumRows<S>& rows) {
  using T = ComputeOf<S>;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const S* x = rows.rows + r * rows.size;
    for_lanes<S>(
        rows.size, CALM_STEP { add_lanes<T>(rows.sum + i, load_lanes<S>(x + i, count), count); });
  }
}

template <typename T>
CALM_INLINE void run(const NoiseRows<T>& rows) {
  const T inverse_size = T(1) / static_cast<T>(rows.size);
  const T eps = static_cast<T>(rows.eps);
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const T* z = rows.z + r * rows.size;
    Vector<T> squares{};
    for_lanes<T>(
        rows.size, CALM_STEP {
          const Vector<T> v = load_lanes<T>(z + i, count);
          squares += v * v;
        });
    const T rstd = T(1) / std::sqrt(sum_lanes<T>(squares) * inverse_size + eps);
    const auto normed = [&](int64_t i, auto count) __attribute__((always_inline)) {
      return load_lanes<T>(z + i, count) * rstd * load_lanes<T>(rows.weight + i, count) +
             load_lanes<T>(rows.bias + i, count);
    };
    Vector<T> total{};
    for_lanes<T>(rows.size, CALM_STEP { total += normed(i, count); });
    const T mean = sum_lanes<T>(total) * inverse_size;
    T* const e = rows.e == nullptr ? nullptr : rows.e + r * rows.size;
    squares = Vector<T>{};
    for_lanes<T>(
        rows.size, CALM_STEP {
          const Vector<T> v = normed(i, count);
          Vector<T> centred = v - mean;
          if (e != nullptr) store_lanes<T>(e + i, v, count);
          // Lanes past the end of the row hold -mean.
          if constexpr (std::is_same_v<decltype(count), int>) {
            for (int j = count; j < kRowLanes<T>; ++j) centred[j] = T(0);
          }
          squares += centred * centred;
        });
    const T norm_rstd = T(1) / std::sqrt(sum_lanes<T>(squares) * inverse_size + eps);
    const T factor = rstd * norm_rstd;
    rows.rstd[r] = rstd;
    rows.mean[r] = mean;
    rows.norm_rstd[r] = norm_rstd;
    T* scaled = rows.scaled.row(r);
    const int64_t panel_stride = rows.scaled.panel_stride(r);
    const T* noise = rows.noise + r * rows.noise_size;
    for_lanes<T>(
        rows.noise_size, CALM_STEP {
          store_lanes<T>(place(scaled, panel_stride, i), load_lanes<T>(noise + i, count) * factor,
                         count);
        });
    if (rows.appends) {
      *place(scaled, panel_stride, rows.noise_size) = factor;
      *place(scaled, panel_stride, rows.noise_size + 1) = norm_rstd;
    }
  }
}

template <typename T>
CALM_INLINE void run(const NoiseBackwardRows<T>& rows) {
  const T inverse_size = T(1) / static_cast<T>(rows.size);
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    T* const z = rows.z + r * rows.size;
    const T* const grad_out = rows.grad_out + r * rows.size;
    const T* const grad_first = rows.grad_first + r * rows.size;
    const T rstd = rows.rstd[r];
    const T mean = rows.mean[r];
    const T norm_rstd = rows.norm_rstd[r];
    const T factor = rstd * norm_rstd;
    Vector<T> by_factor{};
    Vector<T> by_norm{};
    for_lanes<T>(
        rows.size, CALM_STEP {
          const Vector<T> g = load_lanes<T>(grad_first + i, count);
          by_factor += g * load_lanes<T>(rows.by_factor + i, count);
          by_norm += g * load_lanes<T>(rows.by_norm + i, count);
          add_lanes(rows.factor_sum + i, g * factor, count);
          add_lanes(rows.norm_sum + i, g * norm_rstd, count);
        });
    const T* const noise = rows.noise + r * rows.noise_size;
    const T* const grad_scaled = rows.grad_scaled + r * rows.noise_size;
    for_lanes<T>(
        rows.noise_size, CALM_STEP {
          by_factor += load_lanes<T>(grad_scaled + i, count) * load_lanes<T>(noise + i, count);
        });
    const T grad_factor = sum_lanes<T>(by_factor);
    const T grad_norm_rstd = grad_factor * rstd + sum_lanes<T>(by_norm);
    // d rstd / d row = -rstd^3 row / size, of either norm.
    const T of_centred = -grad_norm_rstd * norm_rstd * norm_rstd * norm_rstd * inverse_size;
    // Gradient of e.
    const auto grad_e = [&](const Vector<T>& unit, int64_t i, auto count)
                            __attribute__((always_inline)) {
                              const Vector<T> e = unit * load_lanes<T>(rows.weight + i, count) +
                                                  load_lanes<T>(rows.bias + i, count);
                              return load_lanes<T>(grad_out + i, count) + (e - mean) * of_centred;
                            };
    Vector<T> by_rstd{};
    for_lanes<T>(
        rows.size, CALM_STEP {
          const Vector<T> v = load_lanes<T>(z + i, count);
          const Vector<T> unit = v * rstd;
          const Vector<T> g = grad_e(unit, i, count);
          add_lanes(rows.grad_weight + i, g * unit, count);
          add_lanes(rows.grad_bias + i, g, count);
          add_lanes(rows.grad_out_sum + i, load_lanes<T>(grad_out + i, count), count);
          by_rstd += g * load_lanes<T>(rows.weight + i, count) * v;
        });
    const T grad_rstd = grad_factor * norm_rstd + sum_lanes<T>(by_rstd);
    const T of_z = -grad_rstd * rstd * rstd * rstd * inverse_size;
    for_lanes<T>(
        rows.size, CALM_STEP {
          const Vector<T> v = load_lanes<T>(z + i, count);
          const Vector<T> g =
              grad_e(v * rstd, i, count) * (load_lanes<T>(rows.weight + i, count) * rstd) +
              v * of_z;
          store_lanes<T>(z + i, g, count);
          add_lanes(rows.grad_z_sum + i, g, count);
        });
  }
}

}  // namespace

// One clone a dtype and instruction set: attributes do not reach the instances of a template.
#define CALM_RUN_ROWS(Rows, S)                              \
  template <>                                               \
  CALM_MULTIVERSION void run_rows<S>(const Rows<S>& rows) { \
    run(rows);                                              \
  }
#define CALM_ALL_ROWS(S)                  \
  CALM_RUN_ROWS(LayerNormRows, S)         \
  CALM_RUN_ROWS(LayerNormBackwardRows, S) \
  CALM_RUN_ROWS(SiluRows, S)              \
  CALM_RUN_ROWS(SiluBackwardRows, S)      \
  CALM_RUN_ROWS(GatedRows, S)             \
  CALM_RUN_ROWS(GatedBackwardRows, S)     \
  CALM_RUN_ROWS(SampleSumRows, S)         \
  CALM_RUN_ROWS(ColumnSumRows, S)

CALM_ALL_ROWS(float)
CALM_ALL_ROWS(double)
CALM_ALL_ROWS(torch::headeronly::BFloat16)
CALM_ALL_ROWS(torch::headeronly::Half)
CALM_RUN_ROWS(NoiseRows, float)
CALM_RUN_ROWS(NoiseRows, double)
CALM_RUN_ROWS(NoiseBackwardRows, float)
CALM_RUN_ROWS(NoiseBackwardRows, double)

}  // namespace calm
