// Passes over one row of logits: the arithmetic behind cpu/linear_cross_entropy.cpp.
#pragma once

#include <cstdint>

namespace calm {

// Rows of logits have `padded` elements, a multiple of kRowLanes, and start on 64 bytes. What lies
// past the vocabulary is overwritten with -infinity.
constexpr int64_t kRowLanes = 16;

// As calm_kernels/reference/linear_cross_entropy.py has it: entries that a sparse row may list.
constexpr int64_t kListCapacity = 64;

template <typename T>
struct RowSoftmax {
  T top;        // the largest logit, NaN if one is NaN
  T total;      // sum of exp(logit - top)
  T at_target;  // the target's logit
  bool correct;
};

// Adds the bias, unless null, and turns logits into exp(logit - top).
RowSoftmax<float> softmax_row(float* row, const float* bias, int64_t vocab_size, int64_t padded,
                              int64_t target);
RowSoftmax<double> softmax_row(double* row, const double* bias, int64_t vocab_size, int64_t padded,
                               int64_t target);

// The same for a known top, times a factor.
void scaled_exponentials(float* row, const float* bias, int64_t vocab_size, int64_t padded,
                         float top, float factor);
void scaled_exponentials(double* row, const double* bias, int64_t vocab_size, int64_t padded,
                         double top, double factor);

void scale_row(float* row, int64_t padded, float factor);
void scale_row(double* row, int64_t padded, double factor);

// The columns above a threshold in ascending order, at most kListCapacity of them: `columns` has
// room for kListCapacity + kRowLanes. Returns their number, kListCapacity + 1 if there are more.
int64_t list_above(const float* row, int64_t padded, float threshold, int32_t* columns);
int64_t list_above(const double* row, int64_t padded, double threshold, int32_t* columns);

// out += factor * x, over size elements.
void add_scaled(float* out, const float* x, float factor, int64_t size);
void add_scaled(double* out, const double* x, double factor, int64_t size);

}  // namespace calm
