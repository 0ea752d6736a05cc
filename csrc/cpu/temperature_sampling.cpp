// Temperature sampling from draws, on CPUs: the vote and a round of the exact method.
//
// Vote: a hash table of the draws' patches gives the distinct ones in the order of their first
// occurrence and how often each occurs; the hash finds a candidate, the comparison of all K ids
// decides. Then one product a count for the weights and one running sum. O(N K) a sequence; fewest
// bytes: the draws read once (8 N K); table and counts (24 bytes a draw) stay in L1 at N = 200.
//
// Exact: a state machine walks the draws of a round in order and stops where it accepts. A draw
// that differs from the candidate is told by its first token as a rule, so most draws cost one
// comparison; uniforms are made only where one is needed.
//
// Sequences are independent and split over torch's pool.

#include "common/temperature.h"

#include <algorithm>
#include <vector>

#include "cpu/registration.h"

namespace calm {
namespace {

// Draws per task: about 50 microseconds of work.
constexpr int64_t kGrainDraws = 1 << 12;

int64_t grain(int64_t num_draws) {
  return std::max<int64_t>(1, kGrainDraws / std::max<int64_t>(1, num_draws));
}

// Almost surely equal when asked, so without an early exit.
template <typename Id>
inline bool same_patch(const Id* a, const Id* b, int64_t patch_size) {
  Id difference = 0;
  for (int64_t k = 0; k < patch_size; ++k) difference |= a[k] ^ b[k];
  return difference == 0;
}

// The distinct patches of one sequence at a time, in the order of their first occurrence.
class PatchCounts {
 public:
  struct Patch {
    int64_t first;  // the draw where it occurs first
    int64_t count;
  };

  explicit PatchCounts(int64_t num_draws)
      : shift_(64 - vote_table_log2(num_draws)), slots_(size_t{1} << (64 - shift_)) {
    patches_.reserve(static_cast<size_t>(num_draws));
  }

  template <typename Id>
  void count(const Draws<Id>& draws, int64_t sequence) {
    std::fill(slots_.begin(), slots_.end(), Slot{0, 0});
    patches_.clear();
    largest_ = 0;
    const size_t mask = slots_.size() - 1;
    for (int64_t i = 0; i < draws.num_draws; ++i) {
      const Id* ids = draws.patch(sequence, i);
      const uint64_t hash = hash_patch(ids, draws.patch_size);
      const uint32_t tag = static_cast<uint32_t>(hash);
      size_t at = static_cast<size_t>(hash >> shift_);
      for (;; at = (at + 1) & mask) {
        Slot& slot = slots_[at];
        if (slot.number == 0) {
          patches_.push_back({i, 1});
          slot = {tag, static_cast<uint32_t>(patches_.size())};
          largest_ = std::max<int64_t>(largest_, 1);
          break;
        }
        if (slot.tag != tag) continue;
        Patch& patch = patches_[slot.number - 1];
        if (same_patch(ids, draws.patch(sequence, patch.first), draws.patch_size)) {
          largest_ = std::max(largest_, ++patch.count);
          break;
        }
      }
    }
  }

  const std::vector<Patch>& patches() const { return patches_; }
  int64_t largest() const { return largest_; }

 private:
  struct Slot {
    uint32_t tag;
    uint32_t number;  // of the patch, from 1; 0: the slot is free
  };

  int shift_;
  std::vector<Slot> slots_;
  std::vector<Patch> patches_;
  int64_t largest_ = 0;
};

// weights[c] for c = 1..largest; those that round to zero are left out: returns the least count
// that has a weight.
int64_t weigh_counts(const VoteLaw& law, int64_t largest, std::vector<double>& weights) {
  double product = 1.0;
  for (int64_t c = largest;; --c) {
    weights[c] = rounded_weight(product);
    if (c == 1) return 1;
    product *= law.factor(c);
    if (product < kNegligibleWeight) return c;
  }
}

struct VoteResult {
  int64_t* count;
  int64_t* num_distinct;
};

template <typename Id>
void vote(const Draws<Id>& draws, const double* exponent, const int64_t* rows, uint64_t seed,
          Id* chosen, const VoteResult& result, int64_t begin, int64_t end) {
  PatchCounts counts(draws.num_draws);
  std::vector<double> weights(static_cast<size_t>(draws.num_draws) + 1);
  for (int64_t s = begin; s < end; ++s) {
    counts.count(draws, s);
    const int64_t least =
        weigh_counts(VoteLaw(exponent[s], draws.num_draws), counts.largest(), weights);
    double total = 0.0;
    for (const auto& patch : counts.patches()) {
      if (patch.count >= least) total += weights[patch.count];
    }
    const double u =
        wide_uniform(seed, static_cast<uint64_t>(rows[s]), 0, Stream::kBatchTemperature);
    const double threshold = u * total;
    double running = 0.0;
    // Some patch passes the threshold, for u < 1.
    PatchCounts::Patch winner = counts.patches().front();
    for (const auto& patch : counts.patches()) {
      if (patch.count < least) continue;
      winner = patch;
      running += weights[patch.count];
      if (!(running <= threshold)) break;
    }
    std::copy_n(draws.patch(s, winner.first), draws.patch_size, chosen + s * draws.patch_size);
    result.count[s] = winner.count;
    result.num_distinct[s] = static_cast<int64_t>(counts.patches().size());
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
                                                            const Tensor& rows_in,
                                                            const Tensor& seed_tensor) {
  const Tensor tokens = with_neighbouring_ids(tokens_in);
  const Tensor exponent = torch::stable::contiguous(exponent_in);
  const Tensor rows = torch::stable::contiguous(rows_in);
  const int64_t num_sequences = tokens.size(0);
  Tensor patches = torch::stable::new_empty(tokens, {num_sequences, tokens.size(2)});
  Tensor count = torch::stable::new_empty(tokens, {num_sequences}, ScalarType::Long);
  Tensor num_distinct = torch::stable::new_empty(tokens, {num_sequences}, ScalarType::Long);
  if (num_sequences == 0) return {patches, count, num_distinct};
  const uint64_t seed = static_cast<uint64_t>(*seed_tensor.const_data_ptr<int64_t>());
  const VoteResult result{count.mutable_data_ptr<int64_t>(),
                          num_distinct.mutable_data_ptr<int64_t>()};
  const auto run = [&]<typename Id>(Id* chosen) {
    const Draws<Id> draws = draws_of<Id>(tokens);
    const double* b = exponent.const_data_ptr<double>();
    const int64_t* row = rows.const_data_ptr<int64_t>();
    torch::stable::parallel_for(
        0, num_sequences, grain(draws.num_draws),
        [&](int64_t begin, int64_t end) { vote(draws, b, row, seed, chosen, result, begin, end); });
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
