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
#include <span>
#include <vector>

#include "cpu/registration.h"

namespace calm {
namespace {

// Draws per task: about 70 microseconds of work; for less it does not pay to wake a thread.
constexpr int64_t kGrainDraws = 1 << 13;

int64_t grain(int64_t num_draws) {
  return std::max<int64_t>(1, kGrainDraws / std::max<int64_t>(1, num_draws));
}

// The distinct patches of one sequence at a time, in the order of their first occurrence. K is the
// patch size, or 0 where it is known at run time only.
//
// Whether a draw brings a new patch is as good as random, and a branch on it is guessed wrong every
// other time. So new and known take one path: a new patch is compared with itself. With that and K
// unrolled a draw costs 30% less (N = 200, Zipf over 1000 patches). A free slot is 0, another one
// holds the upper half of a hash and the patch's number from 1.
template <typename Id, int K>
class PatchCounts {
 public:
  struct Patch {
    int32_t first;  // the draw where it occurs first
    int32_t count;
  };

  explicit PatchCounts(int64_t num_draws)
      : shift_(64 - 1 - vote_table_log2(num_draws)),
        slots_(size_t{1} << (64 - shift_)),
        patches_(static_cast<size_t>(num_draws)) {}

  void count(const Draws<Id>& draws, int64_t sequence) {
    std::fill(slots_.begin(), slots_.end(), uint64_t{0});
    std::fill(patches_.begin(), patches_.end(), Patch{0, 0});
    const int64_t patch_size = K > 0 ? K : draws.patch_size;
    const size_t mask = slots_.size() - 1;
    distinct_ = 0;
    for (int64_t i = 0; i < draws.num_draws; ++i) {
      const Id* ids = draws.patch(sequence, i);
      const uint64_t hash = hash_patch(ids, patch_size);
      for (size_t at = static_cast<size_t>(hash >> shift_);; at = (at + 1) & mask) {
        const uint64_t slot = slots_[at];
        const uint64_t fresh = slot == 0;
        const uint64_t number = (slot & 0xFFFFFFFFu) + fresh * (distinct_ + 1);
        const uint64_t entry = (hash << 32) | number;
        Patch& patch = patches_[number - 1];
        const int64_t first = patch.first + static_cast<int64_t>(fresh) * i;
        const uint64_t other = (slot ^ entry) * (1 - fresh);
        if ((other | differs(ids, draws.patch(sequence, first), patch_size)) != 0) [[unlikely]] {
          continue;
        }
        patch = {static_cast<int32_t>(first), patch.count + 1};
        slots_[at] = entry;
        distinct_ += fresh;
        break;
      }
    }
  }

  std::span<const Patch> patches() const { return {patches_.data(), distinct_}; }

  int64_t largest() const {
    int32_t largest = 0;
    for (const Patch& patch : patches()) largest = std::max(largest, patch.count);
    return largest;
  }

 private:
  // Almost surely equal when asked, so without an early exit.
  static uint64_t differs(const Id* a, const Id* b, int64_t patch_size) {
    Id difference = 0;
    for (int64_t k = 0; k < patch_size; ++k) difference |= a[k] ^ b[k];
    return static_cast<uint64_t>(difference);
  }

  int shift_;
  std::vector<uint64_t> slots_;
  std::vector<Patch> patches_;
  uint64_t distinct_ = 0;
};

// weights[c] for c = 1..largest, zero where it rounds to zero.
void weigh_counts(const VoteLaw& law, int64_t largest, std::vector<double>& weights) {
  double product = 1.0;
  int64_t c = largest;
  for (; c >= 1 && !(product < kNegligibleWeight); --c) {
    weights[c] = rounded_weight(product);
    if (c > 1) product *= law.factor(c);
  }
  std::fill(weights.begin(), weights.begin() + c + 1, 0.0);
}

struct VoteResult {
  int64_t* count;
  int64_t* num_distinct;
};

template <int K, typename Id>
void vote(const Draws<Id>& draws, const double* exponent, const int64_t* rows, uint64_t seed,
          Id* chosen, const VoteResult& result, int64_t begin, int64_t end) {
  PatchCounts<Id, K> counts(draws.num_draws);
  std::vector<double> weights(static_cast<size_t>(draws.num_draws) + 1);
  for (int64_t s = begin; s < end; ++s) {
    counts.count(draws, s);
    const auto patches = counts.patches();
    weigh_counts(VoteLaw(exponent[s], draws.num_draws), counts.largest(), weights);
    // Multiples of 2^-40, so the sum is exact in any order: four chains of additions, not one.
    double part[4] = {};
    for (size_t i = 0; i < patches.size(); ++i) part[i % 4] += weights[patches[i].count];
    const double total = part[0] + part[1] + part[2] + part[3];
    const double u =
        wide_uniform(seed, static_cast<uint64_t>(rows[s]), 0, Stream::kBatchTemperature);
    const double threshold = u * total;
    // Some patch passes the threshold, for u < 1.
    size_t winner = 0;
    for (double running = weights[patches[0].count]; running <= threshold;) {
      if (winner + 1 == patches.size()) break;
      running += weights[patches[++winner].count];
    }
    std::copy_n(draws.patch(s, patches[winner].first), draws.patch_size,
                chosen + s * draws.patch_size);
    result.count[s] = patches[winner].count;
    result.num_distinct[s] = static_cast<int64_t>(patches.size());
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
    torch::stable::parallel_for(0, num_sequences, grain(draws.num_draws),
                                [&](int64_t begin, int64_t end) {
                                  if (draws.patch_size == 4) {
                                    vote<4>(draws, b, row, seed, chosen, result, begin, end);
                                  } else {
                                    vote<0>(draws, b, row, seed, chosen, result, begin, end);
                                  }
                                });
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
