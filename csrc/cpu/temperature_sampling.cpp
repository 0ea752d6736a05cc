// Temperature sampling from draws, on CPUs: the vote and a round of the exact method.
//
// Vote: a count of equal patches, one product a count for the weights and one running sum. O(N K) a
// sequence; fewest bytes: the draws read once (8 N K).
//
// Exact: a state machine walks the draws of a round in order and stops where it accepts. A draw
// that differs from the candidate is told by its first token as a rule, so most draws cost one
// comparison; uniforms are made only where one is needed.
//
// Sequences are independent and split over torch's pool.

#include "common/temperature.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/multiversion.h"
#include "cpu/patch_counts.h"
#include "cpu/registration.h"

namespace calm {
namespace {

// Draws per task: about 12 microseconds of work, and of waiting for 128 KiB where they lie in no
// cache; for less it does not pay to wake a thread.
constexpr int64_t kGrainDraws = 1 << 12;

int64_t grain(int64_t num_draws) {
  return std::max<int64_t>(1, kGrainDraws / std::max<int64_t>(1, num_draws));
}

// weights[c] for counts c from the largest one down; returns the largest count whose weight, and
// that of all smaller ones, is zero.
CALM_MULTIVERSION int64_t weigh_counts(const VoteLaw& law, int64_t largest,
                                       std::vector<double>& weights) {
  double product = 1.0;
  int64_t c = largest;
  for (; c >= 1 && !(product < kNegligibleWeight); --c) {
    weights[c] = rounded_weight(product);
    if (c > 1) product *= law.factor(c);
  }
  return c;
}

struct Tally {
  int32_t largest;
  int32_t num_distinct;
};

CALM_MULTIVERSION Tally tally(const std::vector<int32_t>& counts, int64_t num_draws) {
  int32_t largest = 0;
  int32_t num_distinct = 0;
  for (int64_t i = 0; i < num_draws; ++i) {
    largest = std::max(largest, counts[i]);
    num_distinct += counts[i] > 0 ? 1 : 0;
  }
  return {largest, num_distinct};
}

// The patches that can be chosen, by the draw where they occur first.
struct Electables {
  explicit Electables(int64_t num_draws)
      : draws(static_cast<size_t>(num_draws) + PatchTable::kVectorLanes),
        weights(static_cast<size_t>(num_draws) + 1) {}

  // Weights are multiples of 2^-40: a sum of them is exact in any order.
  double total(const std::vector<int32_t>& counts) const {
    double part[4] = {};
    for (int64_t i = 0; i < size; ++i) part[i % 4] += weights[counts[draws[i]]];
    return (part[0] + part[1]) + (part[2] + part[3]);
  }

  // The first one at which the running sum passes the threshold.
  int64_t find(const std::vector<int32_t>& counts, double threshold) const {
    double running = 0.0;
    for (int64_t i = 0; i < size; ++i) {
      running += weights[counts[draws[i]]];
      if (running > threshold) return draws[i];
    }
    // The threshold was rounded up to the total: the last patch that can be chosen.
    int64_t last = size - 1;
    while (weights[counts[draws[last]]] == 0.0) --last;
    return draws[last];
  }

  std::vector<int32_t> draws;
  std::vector<double> weights;  // by count
  int64_t size = 0;
};

template <typename Id>
struct VoteTask {
  Draws<Id> draws;
  const double* exponent;
  const int64_t* rows;  // nullptr: 0, 1, 2, ...
  uint64_t seed;
  Id* chosen;
  int64_t* count;
  int64_t* num_distinct;
};

// Votes of sequences begin <= s < end.
template <typename Id>
void vote(const VoteTask<Id>& task, int64_t begin, int64_t end) {
  const Draws<Id>& draws = task.draws;
  PatchTable table(draws.num_draws);
  Electables electables(draws.num_draws);
  const auto& counts = table.counts;
  for (int64_t s = begin; s < end; ++s) {
    const Id* next = draws.patch(std::min(s + 1, end - 1), 0);
    count_patches(SequenceDraws<Id>{draws.patch(s, 0), draws.draw_stride, draws.num_draws,
                                    draws.patch_size, next},
                  table);
    const Tally found = tally(counts, draws.num_draws);
    const VoteLaw law(task.exponent[s], draws.num_draws);
    const int64_t least = weigh_counts(law, found.largest, electables.weights);
    electables.size =
        list_counts_above(table, static_cast<int32_t>(least), electables.draws.data());
    const uint64_t row = static_cast<uint64_t>(task.rows == nullptr ? s : task.rows[s]);
    const double u = wide_uniform(task.seed, row, 0, Stream::kBatchTemperature);
    const int64_t winner = electables.find(counts, u * electables.total(counts));
    std::copy_n(draws.patch(s, winner), draws.patch_size, task.chosen + s * draws.patch_size);
    task.count[s] = counts[winner];
    task.num_distinct[s] = found.num_distinct;
  }
}

template <typename Id>
inline bool is_candidate(const Id* draw, const Id* candidate, int64_t patch_size) {
  for (int64_t k = 0; k < patch_size; ++k) {
    if (draw[k] != candidate[k]) return false;
  }
  return true;
}

template <typename Id>
void advance(const Draws<Id>& draws, int64_t sequence, const ExactLaw& law, int64_t max_draws,
             Id* candidate_out, ExactProgress& state) {
  const Id* candidate = candidate_out;
  for (int64_t i = 0; i < draws.num_draws; ++i) {
    if (state.accepted != 0 || state.num_draws >= max_draws) break;
    const Id* draw = draws.patch(sequence, i);
    const bool starts = state.matches == 0;
    if (starts) candidate = draw;
    consume_draw(state, starts || is_candidate(draw, candidate, draws.patch_size), law);
  }
  if (candidate != candidate_out) std::copy_n(candidate, draws.patch_size, candidate_out);
}

// Strided draws are read where they are, as long as the ids of a patch are neighbours.
Tensor with_neighbouring_ids(const Tensor& tokens) {
  const bool neighbours = tokens.size(2) == 1 || tokens.stride(2) == 1;
  return neighbours ? tokens : torch::stable::contiguous(tokens);
}

template <typename Id>
Draws<Id> draws_of(const Tensor& tokens) {
  return {tokens.const_data_ptr<Id>(),
          tokens.stride(0),
          tokens.stride(1),
          tokens.size(0),
          tokens.size(1),
          tokens.size(2)};
}

std::tuple<Tensor, Tensor, Tensor> batch_temperature_sample(const Tensor& tokens_in,
                                                            const Tensor& exponent_in,
                                                            const std::optional<Tensor>& rows_in,
                                                            const Tensor& seed_tensor) {
  const Tensor tokens = with_neighbouring_ids(tokens_in);
  const Tensor exponent = torch::stable::contiguous(exponent_in);
  const Tensor rows = rows_in ? torch::stable::contiguous(*rows_in) : Tensor();
  const int64_t num_sequences = tokens.size(0);
  Tensor patches = torch::stable::new_empty(tokens, {num_sequences, tokens.size(2)});
  Tensor count = torch::stable::new_empty(tokens, {num_sequences}, ScalarType::Long);
  Tensor num_distinct = torch::stable::new_empty(tokens, {num_sequences}, ScalarType::Long);
  if (num_sequences == 0) return {patches, count, num_distinct};
  const uint64_t seed = static_cast<uint64_t>(*seed_tensor.const_data_ptr<int64_t>());
  const auto run = [&]<typename Id>(Id* chosen) {
    const VoteTask<Id> task{draws_of<Id>(tokens),
                            exponent.const_data_ptr<double>(),
                            rows_in ? rows.const_data_ptr<int64_t>() : nullptr,
                            seed,
                            chosen,
                            count.mutable_data_ptr<int64_t>(),
                            num_distinct.mutable_data_ptr<int64_t>()};
    torch::stable::parallel_for(0, num_sequences, grain(task.draws.num_draws),
                                [&](int64_t begin, int64_t end) { vote(task, begin, end); });
  };
  if (tokens.scalar_type() == ScalarType::Long) {
    run(patches.mutable_data_ptr<int64_t>());
  } else {
    run(patches.mutable_data_ptr<int32_t>());
  }
  return {patches, count, num_distinct};
}

std::tuple<Tensor, Tensor> exact_temperature_step(const Tensor& draws_in,
                                                  const Tensor& candidate_in,
                                                  const Tensor& progress_in,
                                                  const Tensor& num_equal_in,
                                                  const Tensor& fraction_in, const Tensor& rows_in,
                                                  const Tensor& seed_tensor, int64_t max_draws) {
  const Tensor tokens = with_neighbouring_ids(draws_in);
  const Tensor num_equal = torch::stable::contiguous(num_equal_in);
  const Tensor fraction = torch::stable::contiguous(fraction_in);
  const Tensor rows = torch::stable::contiguous(rows_in);
  const int64_t num_sequences = tokens.size(0);
  const int64_t patch_size = tokens.size(2);
  Tensor candidate = torch::stable::new_empty(tokens, {num_sequences, patch_size});
  Tensor progress =
      torch::stable::new_empty(tokens, {num_sequences, kExactColumns}, ScalarType::Long);
  torch::stable::copy_(candidate, candidate_in);
  torch::stable::copy_(progress, progress_in);
  if (num_sequences == 0) return {candidate, progress};
  const uint64_t seed = static_cast<uint64_t>(*seed_tensor.const_data_ptr<int64_t>());
  const auto run = [&]<typename Id>(Id* candidates) {
    const Draws<Id> draws = draws_of<Id>(tokens);
    const int64_t* n = num_equal.const_data_ptr<int64_t>();
    const double* a = fraction.const_data_ptr<double>();
    const int64_t* row = rows.const_data_ptr<int64_t>();
    int64_t* columns = progress.mutable_data_ptr<int64_t>();
    torch::stable::parallel_for(
        0, num_sequences, grain(draws.num_draws), [&](int64_t begin, int64_t end) {
          for (int64_t s = begin; s < end; ++s) {
            int64_t* c = columns + s * kExactColumns;
            ExactProgress state{c[0], c[1], c[2], c[3], c[4] > 0};
            const ExactLaw law{n[s], a[s], seed, static_cast<uint64_t>(row[s])};
            advance(draws, s, law, max_draws, candidates + s * patch_size, state);
            c[0] = state.matches;
            c[1] = state.trial;
            c[2] = state.num_draws;
            c[3] = state.num_uniforms;
            c[4] = state.accepted;
          }
        });
  };
  if (tokens.scalar_type() == ScalarType::Long) {
    run(candidate.mutable_data_ptr<int64_t>());
  } else {
    run(candidate.mutable_data_ptr<int32_t>());
  }
  return {candidate, progress};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("batch_temperature_sample", TORCH_BOX(&calm::batch_temperature_sample));
  m.impl("exact_temperature_step", TORCH_BOX(&calm::exact_temperature_step));
}
