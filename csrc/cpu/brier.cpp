// Brier U-statistic of S draws for P positions, and its two rates, on CPUs.
//
// Work: a position compares its S(S-1)/2 pairs and S (draw, target) pairs; a comparison stops at
// the first token that differs, so a typical one reads two tokens. Fewest bytes: samples and target
// read once, scores written once. Positions are independent and split over torch's pool; the draws
// of one position (S*K ids, 256 bytes at S=8, K=4) stay in L1 for all of its pairs.

#include "common/brier.h"

#include <algorithm>
#include <vector>

#include "cpu/registration.h"

namespace calm {
namespace {

// Positions per task: below about this many the hand-over to the pool costs more than it saves.
constexpr int64_t kGrain = 256;

template <typename Id>
inline int64_t common_prefix(const Id* a, const Id* b, int64_t length) {
  int64_t n = 0;
  while (n < length && a[n] == b[n]) ++n;
  return n;
}

template <typename Id>
void score_positions(const Id* samples, const Id* target, const BrierResults& results,
                     const BrierShape& shape, int64_t begin, int64_t end) {
  const int64_t stride = shape.num_positions * shape.patch_size;
  // prefixes[n] counts comparisons that agree in exactly n tokens; suffix sums give "at least n".
  std::vector<int64_t> hit_prefixes(shape.num_ngrams + 1);
  std::vector<int64_t> pair_prefixes(shape.num_ngrams + 1);
  for (int64_t p = begin; p < end; ++p) {
    std::fill(hit_prefixes.begin(), hit_prefixes.end(), 0);
    std::fill(pair_prefixes.begin(), pair_prefixes.end(), 0);
    const Id* first = samples + p * shape.patch_size;
    const Id* truth = target + p * shape.patch_size;
    for (int64_t i = 0; i < shape.num_samples; ++i) {
      const Id* draw = first + i * stride;
      ++hit_prefixes[common_prefix(draw, truth, shape.num_ngrams)];
      for (int64_t j = i + 1; j < shape.num_samples; ++j) {
        ++pair_prefixes[common_prefix(draw, first + j * stride, shape.num_ngrams)];
      }
    }
    int64_t hits = 0;
    int64_t pairs = 0;
    for (int64_t n = shape.num_ngrams; n >= 1; --n) {
      hits += hit_prefixes[n];
      pairs += pair_prefixes[n];
      results.write(p * shape.num_ngrams + n - 1, hits, pairs, shape.num_samples);
    }
  }
}

BrierShape shape_of(const Tensor& samples, int64_t max_ngram) {
  const int64_t patch_size = samples.size(2);
  return {samples.size(0), samples.size(1), patch_size, std::min(patch_size, max_ngram)};
}

Tensor empty_results(const Tensor& samples, const BrierShape& shape) {
  return torch::stable::new_empty(samples, {shape.num_positions, shape.num_ngrams},
                                  ScalarType::Float);
}

void run(const Tensor& samples_in, const Tensor& target_in, const BrierResults& results,
         const BrierShape& shape) {
  const Tensor samples = torch::stable::contiguous(samples_in);
  const Tensor target = torch::stable::contiguous(target_in);
  const auto score = [&]<typename Id>(const Id* sample_ids) {
    const Id* target_ids = target.const_data_ptr<Id>();
    torch::stable::parallel_for(0, shape.num_positions, kGrain, [&](int64_t begin, int64_t end) {
      score_positions(sample_ids, target_ids, results, shape, begin, end);
    });
  };
  if (samples.scalar_type() == ScalarType::Long) {
    score(samples.const_data_ptr<int64_t>());
  } else {
    score(samples.const_data_ptr<int32_t>());
  }
}

Tensor brier_scores(const Tensor& samples, const Tensor& target, int64_t max_ngram) {
  const BrierShape shape = shape_of(samples, max_ngram);
  Tensor scores = empty_results(samples, shape);
  run(samples, target, {scores.mutable_data_ptr<float>(), nullptr, nullptr}, shape);
  return scores;
}

std::tuple<Tensor, Tensor> brier_rates(const Tensor& samples, const Tensor& target,
                                       int64_t max_ngram) {
  const BrierShape shape = shape_of(samples, max_ngram);
  Tensor hits = empty_results(samples, shape);
  Tensor pairs = empty_results(samples, shape);
  run(samples, target, {nullptr, hits.mutable_data_ptr<float>(), pairs.mutable_data_ptr<float>()},
      shape);
  return {hits, pairs};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("brier_scores", TORCH_BOX(&calm::brier_scores));
  m.impl("brier_rates", TORCH_BOX(&calm::brier_rates));
}
