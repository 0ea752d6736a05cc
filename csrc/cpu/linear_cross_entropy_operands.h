// Operands and results of the vocabulary head's operators on CPUs, and what is known of a row once
// its logits are there.
#pragma once

#include <cmath>
#include <limits>
#include <optional>

#include "cpu/linear_cross_entropy_head.h"

namespace calm {

constexpr int32_t kDense = -1;  // in place of the length of a list

template <typename In>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

inline Tensor compute_like(const Tensor& like, std::vector<int64_t> sizes) {
  const bool wide = like.scalar_type() == ScalarType::Double;
  return torch::stable::new_empty(like, sizes, wide ? ScalarType::Double : ScalarType::Float);
}

// Rows whose target is not ignore_index.
inline std::vector<int64_t> counted_rows(const Tensor& target, int64_t ignore_index) {
  const int64_t* targets = target.const_data_ptr<int64_t>();
  std::vector<int64_t> rows;
  rows.reserve(static_cast<size_t>(target.size(0)));
  for (int64_t r = 0; r < target.size(0); ++r) {
    if (targets[r] != ignore_index) rows.push_back(r);
  }
  return rows;
}

// Operands of a call, contiguous.
template <typename In>
struct Operands {
  using T = typename ComputeType<In>::type;

  Tensor hidden;
  Tensor weight;
  std::optional<Tensor> bias;
  Tensor target;
  HeadShape shape;

  Operands(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
           const Tensor& target)
      : hidden(torch::stable::contiguous(hidden)),
        weight(torch::stable::contiguous(weight)),
        target(torch::stable::contiguous(target)),
        shape(weight.size(0), weight.size(1)) {
    if (bias.has_value()) this->bias = torch::stable::contiguous(*bias);
  }

  const int64_t* targets() const { return target.const_data_ptr<int64_t>(); }

  VocabularyHead<T, In> head(const HeadGradients<T>& gradients, bool has_lists,
                             size_t num_rows) const {
    return VocabularyHead<T, In>(shape, hidden.const_data_ptr<In>(), weight.const_data_ptr<In>(),
                                 bias.has_value() ? bias->const_data_ptr<In>() : nullptr, gradients,
                                 has_lists, static_cast<int64_t>(num_rows));
  }
};

// Gradients in the compute type; [0] where not wanted.
template <typename T>
struct GradientTensors {
  Tensor hidden;
  Tensor weight;
  Tensor bias;

  GradientTensors(const Tensor& like_hidden, const Tensor& like_weight, std::vector<bool> wanted)
      : hidden(make(like_hidden, {like_hidden.size(0), like_hidden.size(1)}, wanted[0])),
        weight(make(like_weight, {like_weight.size(0), like_weight.size(1)}, wanted[1])),
        bias(make(like_weight, {like_weight.size(0)}, wanted[2])),
        pointers_{wanted[0] ? hidden.template mutable_data_ptr<T>() : nullptr,
                  wanted[1] ? weight.template mutable_data_ptr<T>() : nullptr,
                  wanted[2] ? bias.template mutable_data_ptr<T>() : nullptr} {}

  const HeadGradients<T>& pointers() const { return pointers_; }

  // The hidden gradient of rows that take no part.
  void clear_hidden_where(const int64_t* targets, int64_t ignore_index) {
    if (pointers_.hidden == nullptr) return;
    const int64_t size = hidden.size(1);
    for (int64_t r = 0; r < hidden.size(0); ++r) {
      if (targets[r] == ignore_index) std::fill_n(pointers_.hidden + r * size, size, T(0));
    }
  }

 private:
  static Tensor make(const Tensor& like, std::vector<int64_t> sizes, bool wanted) {
    Tensor gradient = compute_like(like, wanted ? sizes : std::vector<int64_t>{0});
    if (wanted) {
      use_large_pages(gradient.mutable_data_ptr(),
                      static_cast<size_t>(gradient.numel()) * sizeof(T));
    }
    return gradient;
  }

  HeadGradients<T> pointers_;
};

// What is known of a row once its exponentials are there.
template <typename T>
struct RowLoss {
  T loss;
  T top;
  T total;
  bool correct;
  int64_t target;  // 0 where it is none, and total is NaN
};

template <typename T, typename In>
RowLoss<T> row_loss(VocabularyHead<T, In>& head, const HeadShape& shape, int64_t slot,
                    int64_t target) {
  const bool broken = target < 0 || target >= shape.vocab_size;
  if (broken) target = 0;
  const RowSoftmax<T> softmax =
      softmax_row(head.logits(slot), head.bias(), shape.vocab_size, shape.padded, target);
  const T total = broken ? std::numeric_limits<T>::quiet_NaN() : softmax.total;
  const T loss = std::log(total) - (softmax.at_target - softmax.top);
  return {loss, softmax.top, total, softmax.correct && !broken, target};
}

struct Listed {
  int64_t length;  // kDense if the row has no list
  double dropped;  // mass that the list leaves out
};

// The list of a row from its exponentials: columns and, as factors, probabilities.
template <typename T, typename In>
Listed list_row(VocabularyHead<T, In>& head, const HeadShape& shape, int64_t slot,
                const RowLoss<T>& row, double drop_mass) {
  constexpr Listed kNone{kDense, 0.0};
  const T significance = static_cast<T>(drop_mass / (2 * kListCapacity));
  const T* exponentials = head.logits(slot);
  int32_t found[kListCapacity + kRowLanes];
  int64_t length = list_above(exponentials, shape.padded, significance * row.total, found);
  if (length > kListCapacity) return kNone;
  const int32_t target = static_cast<int32_t>(row.target);
  int32_t* const place = std::lower_bound(found, found + length, target);
  if (place == found + length || *place != target) {
    if (length == kListCapacity) return kNone;
    std::copy_backward(place, found + length, found + length + 1);
    *place = target;
    ++length;
  }
  int32_t* columns = head.columns(slot);
  T* probabilities = head.factors(slot);
  double kept = 0.0;
  for (int64_t i = 0; i < length; ++i) {
    columns[i] = found[i];
    probabilities[i] = exponentials[found[i]] / row.total;
    kept += static_cast<double>(probabilities[i]);
  }
  const double dropped = std::max(0.0, 1.0 - kept);
  return dropped <= drop_mass && kept == kept ? Listed{length, dropped} : kNone;
}

// Probabilities of a list to shares of the gradient.
template <typename T>
void list_to_gradient(const int32_t* columns, T* factors, int64_t length, int64_t target, T scale) {
  for (int64_t i = 0; i < length; ++i) factors[i] = (factors[i] - (columns[i] == target)) * scale;
}

}  // namespace calm
