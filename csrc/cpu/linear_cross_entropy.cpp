// Cross entropy of the vocabulary head on CPUs, forward and backward.
//
// Work at R rows, H, V: 2 R H V operations for the logits and, for each dense row, twice that for
// its gradients. Sparse rows give theirs from lists of at most 64 entries. Fewest bytes: hidden,
// weight and their gradients once; the weight and its gradient stream through the caches once for
// every buffer of rows, so the buffer is as large as the promise on memory lets it be: 6.25 MiB or
// 64 rows of logits, and eight hidden gradients beside it.
//
// Ignored rows take no part in anything.

#include <optional>
#include <tuple>

#include "cpu/linear_cross_entropy_operands.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace calm {
namespace {

void fill_statistics(Tensor& statistics, size_t num_rows, int64_t num_sparse, double dropped) {
  float* out = statistics.mutable_data_ptr<float>();
  out[0] = static_cast<float>(num_rows);
  out[1] = static_cast<float>(num_sparse);
  out[2] = static_cast<float>(dropped);
}

// f(slot) over the slots, in parallel.
template <typename F>
void for_slots(int64_t begin, int64_t end, const HeadShape& shape, const F& f) {
  constexpr int64_t kGrainValues = 1 << 14;
  const int64_t grain = std::max<int64_t>(1, kGrainValues / shape.padded);
  torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    for (int64_t slot = first; slot < last; ++slot) f(slot);
  });
}

using RowsResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename In>
RowsResult forward_rows(const Operands<In>& operands, int64_t ignore_index, double drop_mass) {
  using T = typename ComputeType<In>::type;
  const HeadShape& shape = operands.shape;
  const int64_t num_rows = operands.hidden.size(0);
  const bool has_lists = drop_mass > 0.0;
  const int64_t capacity = has_lists ? kListCapacity : 0;
  const Tensor& like = operands.hidden;
  Tensor loss = compute_like(like, {num_rows});
  Tensor correct = torch::stable::new_empty(like, {num_rows}, ScalarType::Bool);
  Tensor top = compute_like(like, {num_rows});
  Tensor total = compute_like(like, {num_rows});
  Tensor list_columns = torch::stable::new_empty(like, {num_rows, capacity}, ScalarType::Int);
  Tensor list_probabilities = compute_like(like, {num_rows, capacity});
  Tensor list_length = torch::stable::new_empty(like, {num_rows}, ScalarType::Int);
  Tensor statistics = torch::stable::new_empty(like, {3}, ScalarType::Float);
  T* losses = loss.mutable_data_ptr<T>();
  bool* corrects = correct.mutable_data_ptr<bool>();
  T* tops = top.mutable_data_ptr<T>();
  T* totals = total.mutable_data_ptr<T>();
  int32_t* columns = list_columns.mutable_data_ptr<int32_t>();
  T* probabilities = list_probabilities.mutable_data_ptr<T>();
  int32_t* lengths = list_length.mutable_data_ptr<int32_t>();
  std::fill_n(losses, num_rows, T(0));
  std::fill_n(corrects, num_rows, false);
  std::fill_n(tops, num_rows, T(0));
  std::fill_n(totals, num_rows, T(1));
  std::fill_n(columns, num_rows * capacity, 0);
  std::fill_n(probabilities, num_rows * capacity, T(0));
  std::fill_n(lengths, num_rows, 0);

  const std::vector<int64_t> rows = counted_rows(operands.target, ignore_index);
  std::vector<double> dropped(static_cast<size_t>(num_rows), 0.0);
  auto head = operands.head({nullptr, nullptr, nullptr}, has_lists, rows.size());
  for (size_t next = 0; next < rows.size();) {
    const int64_t count = std::min<int64_t>(head.num_free(), rows.size() - next);
    const int64_t end = head.take(rows.data() + next, count);
    next += static_cast<size_t>(count);
    head.make_logits(0, end);
    for_slots(0, end, shape, [&](int64_t slot) {
      const int64_t r = head.row(slot);
      const RowLoss<T> row = row_loss(head, shape, slot, operands.targets()[r]);
      losses[r] = row.loss;
      corrects[r] = row.correct;
      tops[r] = row.top;
      totals[r] = row.total;
      lengths[r] = kDense;
      if (!has_lists) return;
      const Listed list = list_row(head, shape, slot, row, drop_mass);
      lengths[r] = static_cast<int32_t>(list.length);
      dropped[r] = list.dropped;
      if (list.length == kDense) return;
      std::copy_n(head.columns(slot), list.length, columns + r * capacity);
      std::copy_n(head.factors(slot), list.length, probabilities + r * capacity);
    });
  }
  double largest = 0.0;
  for (double mass : dropped) largest = std::max(largest, mass);
  const int64_t num_sparse =
      std::count_if(lengths, lengths + num_rows, [](int32_t length) { return length > 0; });
  fill_statistics(statistics, rows.size(), num_sparse, largest);
  return {loss, correct, top, total, list_columns, list_probabilities, list_length, statistics};
}

using ReducedResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename In>
ReducedResult reduced(const Operands<In>& operands, int64_t ignore_index, double drop_mass,
                      bool mean, const std::vector<bool>& wanted) {
  using T = typename ComputeType<In>::type;
  const HeadShape& shape = operands.shape;
  const int64_t num_rows = operands.hidden.size(0);
  const bool has_lists = drop_mass > 0.0;
  Tensor loss = compute_like(operands.hidden, {});
  Tensor correct = torch::stable::new_empty(operands.hidden, {num_rows}, ScalarType::Bool);
  Tensor statistics = torch::stable::new_empty(operands.hidden, {3}, ScalarType::Float);
  bool* corrects = correct.mutable_data_ptr<bool>();
  std::fill_n(corrects, num_rows, false);
  GradientTensors<T> gradients(operands.hidden, operands.weight, wanted);
  gradients.clear_hidden_where(operands.targets(), ignore_index);

  const std::vector<int64_t> rows = counted_rows(operands.target, ignore_index);
  const T scale = mean ? T(1) / static_cast<T>(rows.size()) : T(1);
  std::vector<T> losses(rows.size());
  std::vector<double> dropped(rows.size(), -1.0);  // of sparse rows
  auto head = operands.head(gradients.pointers(), has_lists, rows.size());
  const bool any = gradients.pointers().any();
  for (size_t next = 0; next < rows.size();) {
    const int64_t begin = head.first_free();
    const int64_t count = std::min<int64_t>(head.num_free(), rows.size() - next);
    const int64_t end = head.take(rows.data() + next, count);
    head.make_logits(begin, end);
    for_slots(begin, end, shape, [&](int64_t slot) {
      const int64_t r = head.row(slot);
      const size_t at = next + static_cast<size_t>(slot - begin);
      const RowLoss<T> row = row_loss(head, shape, slot, operands.targets()[r]);
      losses[at] = row.loss;
      corrects[r] = row.correct;
      head.set_sparse(slot, 0);
      if (!any) return;
      if (has_lists) {
        const Listed list = list_row(head, shape, slot, row, drop_mass);
        if (list.length != kDense) {
          dropped[at] = list.dropped;
          list_to_gradient(head.columns(slot), head.factors(slot), list.length, row.target, scale);
          head.set_sparse(slot, list.length);
          head.add_list_to_hidden(slot);
          return;
        }
      }
      head.set_dense(slot);
      scale_row(head.logits(slot), shape.padded, scale / row.total);
      head.logits(slot)[row.target] -= scale;
    });
    if (has_lists) head.add_lists_to_weight(begin, end);
    head.keep_dense(begin, end);
    next += static_cast<size_t>(count);
  }
  head.finish();

  double sum = 0.0;
  for (T value : losses) sum += static_cast<double>(value);
  *loss.mutable_data_ptr<T>() = static_cast<T>(mean ? sum / static_cast<double>(rows.size()) : sum);
  double largest = 0.0;
  int64_t num_sparse = 0;
  for (double mass : dropped) {
    largest = std::max(largest, mass);
    num_sparse += mass >= 0.0;
  }
  fill_statistics(statistics, rows.size(), num_sparse, largest);
  return {loss, correct, statistics, gradients.hidden, gradients.weight, gradients.bias};
}

// What the forward saved of every row.
template <typename T>
struct Saved {
  const T* grad_loss;
  const T* top;
  const T* total;
  const int32_t* columns;
  const T* probabilities;
  const int32_t* lengths;
  bool has_lists;
};

template <typename In, typename T>
void backward_of_lists(VocabularyHead<T, In>& head, const Operands<In>& operands,
                       const Saved<T>& saved, const std::vector<int64_t>& rows) {
  for (size_t next = 0; next < rows.size();) {
    const int64_t count = std::min<int64_t>(head.num_free(), rows.size() - next);
    const int64_t end = head.take(rows.data() + next, count);
    next += static_cast<size_t>(count);
    torch::stable::parallel_for(0, end, 16, [&](int64_t first, int64_t last) {
      for (int64_t slot = first; slot < last; ++slot) {
        const int64_t r = head.row(slot);
        const int64_t length = saved.lengths[r];
        std::copy_n(saved.columns + r * kListCapacity, length, head.columns(slot));
        std::copy_n(saved.probabilities + r * kListCapacity, length, head.factors(slot));
        list_to_gradient(head.columns(slot), head.factors(slot), length, operands.targets()[r],
                         saved.grad_loss[r]);
        head.set_sparse(slot, length);
        head.add_list_to_hidden(slot);
      }
    });
    head.add_lists_to_weight(0, end);
  }
}

template <typename In, typename T>
void backward_of_dense(VocabularyHead<T, In>& head, const Operands<In>& operands,
                       const Saved<T>& saved, const std::vector<int64_t>& rows) {
  const HeadShape& shape = operands.shape;
  for (size_t next = 0; next < rows.size();) {
    const int64_t begin = head.first_free();
    const int64_t count = std::min<int64_t>(head.num_free(), rows.size() - next);
    const int64_t end = head.take(rows.data() + next, count);
    next += static_cast<size_t>(count);
    head.make_logits(begin, end);
    for_slots(begin, end, shape, [&](int64_t slot) {
      const int64_t r = head.row(slot);
      const int64_t target = operands.targets()[r];
      scaled_exponentials(head.logits(slot), head.bias(), shape.vocab_size, shape.padded,
                          saved.top[r], saved.grad_loss[r] / saved.total[r]);
      // Elsewhere than among these columns: the total says what to make of it.
      const bool here = target >= 0 && target < shape.vocab_size;
      if (here) head.logits(slot)[target] -= saved.grad_loss[r];
      head.set_dense(slot);
    });
    head.keep_dense(begin, end);
  }
}

template <typename In>
std::tuple<Tensor, Tensor, Tensor> backward_rows(const Operands<In>& operands,
                                                 const Saved<typename ComputeType<In>::type>& saved,
                                                 int64_t ignore_index,
                                                 const std::vector<bool>& wanted) {
  using T = typename ComputeType<In>::type;
  GradientTensors<T> gradients(operands.hidden, operands.weight, wanted);
  gradients.clear_hidden_where(operands.targets(), ignore_index);
  std::vector<int64_t> sparse;
  std::vector<int64_t> dense;
  for (int64_t r : counted_rows(operands.target, ignore_index)) {
    (saved.has_lists && saved.lengths[r] != kDense ? sparse : dense).push_back(r);
  }
  auto head =
      operands.head(gradients.pointers(), saved.has_lists, std::max(sparse.size(), dense.size()));
  backward_of_lists(head, operands, saved, sparse);
  backward_of_dense(head, operands, saved, dense);
  head.finish();
  const auto cast = [&](const Tensor& gradient) {
    return std::is_same_v<In, T> ? gradient
                                 : torch::stable::to(gradient, operands.hidden.scalar_type());
  };
  return {cast(gradients.hidden), cast(gradients.weight), cast(gradients.bias)};
}

// f.operator()<In>() for the element type of a tensor.
template <typename F>
auto for_dtype(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return f.template operator()<double>();
    case ScalarType::BFloat16:
      return f.template operator()<torch::headeronly::BFloat16>();
    case ScalarType::Half:
      return f.template operator()<torch::headeronly::Half>();
    default:
      return f.template operator()<float>();
  }
}

RowsResult linear_cross_entropy_rows(const Tensor& hidden, const Tensor& weight,
                                     const std::optional<Tensor>& bias, const Tensor& target,
                                     int64_t ignore_index, double drop_mass) {
  return for_dtype(hidden, [&]<typename In>() {
    return forward_rows(Operands<In>(hidden, weight, bias, target), ignore_index, drop_mass);
  });
}

ReducedResult linear_cross_entropy_reduced(const Tensor& hidden, const Tensor& weight,
                                           const std::optional<Tensor>& bias, const Tensor& target,
                                           int64_t ignore_index, double drop_mass, bool mean,
                                           std::vector<bool> wanted) {
  return for_dtype(hidden, [&]<typename In>() {
    return reduced(Operands<In>(hidden, weight, bias, target), ignore_index, drop_mass, mean,
                   wanted);
  });
}

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy_rows_backward(
    const Tensor& grad_loss_in, const Tensor& hidden, const Tensor& weight,
    const std::optional<Tensor>& bias, const Tensor& target, const Tensor& top_in,
    const Tensor& total_in, const Tensor& columns_in, const Tensor& probabilities_in,
    const Tensor& lengths_in, int64_t ignore_index, std::vector<bool> wanted) {
  using torch::stable::contiguous;
  const Tensor grad_loss = contiguous(grad_loss_in), top = contiguous(top_in);
  const Tensor total = contiguous(total_in), columns = contiguous(columns_in);
  const Tensor probabilities = contiguous(probabilities_in), lengths = contiguous(lengths_in);
  return for_dtype(hidden, [&]<typename In>() {
    using T = typename ComputeType<In>::type;
    const Saved<T> saved{grad_loss.const_data_ptr<T>(),
                         top.const_data_ptr<T>(),
                         total.const_data_ptr<T>(),
                         columns.const_data_ptr<int32_t>(),
                         probabilities.const_data_ptr<T>(),
                         lengths.const_data_ptr<int32_t>(),
                         columns.size(1) > 0};
    return backward_rows(Operands<In>(hidden, weight, bias, target), saved, ignore_index, wanted);
  });
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("linear_cross_entropy_rows", TORCH_BOX(&calm::linear_cross_entropy_rows));
  m.impl("linear_cross_entropy_rows_backward",
         TORCH_BOX(&calm::linear_cross_entropy_rows_backward));
  m.impl("linear_cross_entropy_reduced", TORCH_BOX(&calm::linear_cross_entropy_reduced));
}
