// The pointwise steps of the gated feed-forward block in vector lanes.
//
// Each pass reads and writes a row once; two passes of the norm over one row find it in L1. silu is
// within 3 ulp of the exact value.

#include "cpu/gated_ffn_rows.h"

#include <cmath>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "cpu/lane_rows.h"
#include "cpu/multiversion.h"

namespace calm {
namespace {

template <typename S>
CALM_INLINE void normalise_row(const S* x, const S* weight, ComputeOf<S> rstd, S* normed,
                               int64_t size) {
  for_lanes<S>(size, [&](int64_t i, auto count) __attribute__((always_inline)) {
    store_lanes<S>(normed + i,
                   load_lanes<S>(x + i, count) * rstd * load_lanes<S>(weight + i, count), count);
  });
}

template <typename S>
CALM_INLINE void rms_norm_rows(const RmsNormRows<S>& rows) {
  using T = ComputeOf<S>;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const S* x = rows.x + r * rows.size;
    Vector<T> squares{};
    for_lanes<S>(rows.size, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vector<T> v = load_lanes<S>(x + i, count);
      squares += v * v;
    });
    const T mean = sum_lanes<T>(squares) / static_cast<T>(rows.size);
    const T rstd = T(1) / std::sqrt(mean + static_cast<T>(rows.eps));
    rows.rstd[r] = rstd;
    normalise_row(x, rows.norm_weight, rstd, rows.normed + r * rows.size, rows.size);
  }
}

template <typename S>
CALM_INLINE void rms_norm_again_rows(const RmsNormAgainRows<S>& rows) {
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    normalise_row(rows.x + r * rows.size, rows.norm_weight, rows.rstd[r],
                  rows.normed + r * rows.size, rows.size);
  }
}

template <typename S>
CALM_INLINE void rms_norm_backward_rows(const RmsNormBackwardRows<S>& rows) {
  using T = ComputeOf<S>;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const S* x = rows.x + r * rows.size;
    const S* grad = rows.grad_normed + r * rows.size;
    const S* residual =
        rows.grad_residual == nullptr ? nullptr : rows.grad_residual + r * rows.size;
    S* grad_x = rows.grad_x + r * rows.size;
    const T rstd = rows.rstd[r];
    Vector<T> products{};
    for_lanes<S>(rows.size, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vector<T> by_unit =
          load_lanes<S>(grad + i, count) * (load_lanes<S>(x + i, count) * rstd);
      T* const sum = rows.grad_norm_weight + i;
      store_lanes<T>(sum, load_lanes<T>(sum, count) + by_unit, count);
      products += by_unit * load_lanes<S>(rows.norm_weight + i, count);
    });
    // Scaling x leaves the unit vector unchanged: the component along it is taken off.
    const T along = sum_lanes<T>(products) / static_cast<T>(rows.size);
    for_lanes<S>(rows.size, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vector<T> grad_unit =
          load_lanes<S>(grad + i, count) * load_lanes<S>(rows.norm_weight + i, count);
      const Vector<T> unit = load_lanes<S>(x + i, count) * rstd;
      Vector<T> passed = (grad_unit - unit * along) * rstd;
      if (residual != nullptr) passed += load_lanes<S>(residual + i, count);
      store_lanes<S>(grad_x + i, passed, count);
    });
  }
}

template <typename S>
CALM_INLINE void swiglu_rows(const SwigluRows<S>& rows) {
  using T = ComputeOf<S>;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const S* gates = rows.gate_up + r * 2 * rows.size;
    S* product = rows.product + r * rows.size;
    for_lanes<S>(rows.size, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vector<T> gate = load_lanes<S>(gates + i, count);
      const Vector<T> up = load_lanes<S>(gates + rows.size + i, count);
      store_lanes<S>(product + i, gate / (T(1) + exponential_lanes(-gate)) * up, count);
    });
  }
}

template <typename S>
CALM_INLINE void swiglu_backward_rows(const SwigluBackwardRows<S>& rows) {
  using T = ComputeOf<S>;
  for (int64_t r = 0; r < rows.num_rows; ++r) {
    const S* gates = rows.gate_up + r * 2 * rows.size;
    S* product = rows.product + r * rows.size;
    S* grads = rows.grad_gate_up + r * 2 * rows.size;
    for_lanes<S>(rows.size, [&](int64_t i, auto count) __attribute__((always_inline)) {
      const Vector<T> gate = load_lanes<S>(gates + i, count);
      const Vector<T> up = load_lanes<S>(gates + rows.size + i, count);
      const Vector<T> grad = load_lanes<S>(product + i, count);
      const Vector<T> sigmoid = T(1) / (T(1) + exponential_lanes(-gate));
      const Vector<T> activated = gate * sigmoid;
      const Vector<T> slope = sigmoid * (T(1) + gate * (T(1) - sigmoid));
      store_lanes<S>(product + i, activated * up, count);
      store_lanes<S>(grads + i, grad * up * slope, count);
      store_lanes<S>(grads + rows.size + i, grad * activated, count);
    });
  }
}

}  // namespace

// One clone a dtype and instruction set: attributes do not reach the instances of a template.
#define CALM_GATED_FFN_ROWS(S)                                                      \
  template <>                                                                       \
  CALM_MULTIVERSION void rms_norm<S>(const RmsNormRows<S>& rows) {                  \
    rms_norm_rows(rows);                                                            \
  }                                                                                 \
  template <>                                                                       \
  CALM_MULTIVERSION void rms_norm_again<S>(const RmsNormAgainRows<S>& rows) {       \
    rms_norm_again_rows(rows);                                                      \
  }                                                                                 \
  template <>                                                                       \
  CALM_MULTIVERSION void rms_norm_backward<S>(const RmsNormBackwardRows<S>& rows) { \
    rms_norm_backward_rows(rows);                                                   \
  }                                                                                 \
  template <>                                                                       \
  CALM_MULTIVERSION void swiglu<S>(const SwigluRows<S>& rows) {                     \
    swiglu_rows(rows);                                                              \
  }                                                                                 \
  template <>                                                                       \
  CALM_MULTIVERSION void swiglu_backward<S>(const SwigluBackwardRows<S>& rows) {    \
    swiglu_backward_rows(rows);                                                     \
  }

CALM_GATED_FFN_ROWS(float)
CALM_GATED_FFN_ROWS(double)
CALM_GATED_FFN_ROWS(torch::headeronly::BFloat16)
CALM_GATED_FFN_ROWS(torch::headeronly::Half)

}  // namespace calm
