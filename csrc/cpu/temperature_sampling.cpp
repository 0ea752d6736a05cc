// Temperature sampling from draws, on CPUs: the vote and a round of the exact method.
//
// Vote: a table over hashes tells each draw the first one of its patch; the hash finds a candidate,
// the comparison of all K ids decides. Then one product a count for the weights and one running
// sum. O(N K) a sequence; fewest bytes: the draws read once (8 N K); table and counts (48 bytes a
// draw) stay in L1 at N = 200.
//
// Exact: a state machine walks the draws of a round in order and stops where it accepts. A draw
// that differs from the candidate is told by its first token as a rule, so most draws cost one
// comparison; uniforms are made only where one is needed.
//
// Sequences are independent and split over torch's pool.

#include "common/temperature.h"

#include <algorithm>
#include <optional>
#include <span>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/multiversion.h"
#include "cpu/registration.h"

namespace calm {
namespace {

// Draws per task: about 70 microseconds of work; for less it does not pay to wake a thread.
constexpr int64_t kGrainDraws = 1 << 13;

int64_t grain(int64_t num_draws) {
  return std::max<int64_t>(1, kGrainDraws / std::max<int64_t>(1, num_draws));
}

// Which draws of one sequence are the same patch.
//
// Whether a draw brings a new patch is as good as random, and a branch on it is guessed wrong every
// other time. So nothing branches on it: all draws write their number into the table, the last one
// first, so that every slot ends with the first draw that hashed there; then each draw reads its
// slot back and compares itself with the draw it finds. Those that differ lost their slot to
// another patch, a few in a hundred, and go round again among themselves. In every round the first
// draw of each slot finds itself, so rounds end whatever the hashes are. Only slots written in the
// round are read: the table is never cleared.
struct PatchTable {
  explicit PatchTable(int64_t num_draws)
      : shift(64 - 2 - vote_table_log2(num_draws)),
        slots(size_t{1} << (64 - shift)),
        places(static_cast<size_t>(num_draws)),
        pending(static_cast<size_t>(num_draws)),
        firsts(static_cast<size_t>(num_draws)),
        counts(static_cast<size_t>(num_draws)) {}

  int shift;
  std::vector<int32_t> slots;
  std::vector<int32_t> places;   // each draw's slot
  std::vector<int32_t> pending;  // draws of this round
  std::vector<int32_t> firsts;   // each draw's patch occurs there first
  std::vector<int32_t> counts;   // how often; 0 for draws that repeat an earlier one
};

// The patches of one sequence; K is the patch size, or 0 where it is known at run time only.
template <int K, typename Id>
struct SequenceDraws {
  const Id* ids;
  int64_t stride;
  int64_t num_draws;
  int64_t patch_size;

  CALM_INLINE const Id* operator[](int64_t draw) const { return ids + draw * stride; }
  CALM_INLINE int64_t size() const { return K > 0 ? K : patch_size; }
};

// Notes the first draw of the patch that draw i brings, or that i stays pending; returns how many
// are pending then.
template <typename Draws>
CALM_INLINE int64_t settle(const Draws& draws, int64_t i, int64_t num_pending, const int32_t* slots,
                           const int32_t* places, int32_t* pending, int32_t* firsts) {
  const int64_t first = slots[places[i]];
  const auto* a = draws[i];
  const auto* b = draws[first];
  auto difference = a[0] ^ b[0];
  for (int64_t k = 1; k < draws.size(); ++k) difference |= a[k] ^ b[k];
  firsts[i] = static_cast<int32_t>(first);
  pending[num_pending] = static_cast<int32_t>(i);
  return num_pending + static_cast<int64_t>(difference != 0);
}

template <typename Draws>
CALM_INLINE void count_sequence(const Draws& draws, PatchTable& table) {
  int32_t* const slots = table.slots.data();
  int32_t* const places = table.places.data();
  int32_t* const pending = table.pending.data();
  int32_t* const firsts = table.firsts.data();
  int32_t* const counts = table.counts.data();
  const int64_t num_draws = draws.num_draws;
  for (int64_t i = 0; i < num_draws; ++i) {
    places[i] = static_cast<int32_t>(hash_patch(draws[i], draws.size()) >> table.shift);
  }
  for (int64_t i = num_draws - 1; i >= 0; --i) slots[places[i]] = static_cast<int32_t>(i);
  int64_t num_pending = 0;
  for (int64_t i = 0; i < num_draws; ++i) {
    num_pending = settle(draws, i, num_pending, slots, places, pending, firsts);
  }
  while (num_pending > 0) {
    for (int64_t p = num_pending - 1; p >= 0; --p) slots[places[pending[p]]] = pending[p];
    const int64_t num_before = num_pending;
    num_pending = 0;
    for (int64_t p = 0; p < num_before; ++p) {
      num_pending = settle(draws, pending[p], num_pending, slots, places, pending, firsts);
    }
  }
  std::fill_n(counts, num_draws, 0);
  for (int64_t i = 0; i < num_draws; ++i) ++counts[firsts[i]];
}

template <int K, typename Id>
void count_patches(const SequenceDraws<K, Id>& draws, PatchTable& table);

#define CALM_COUNT_PATCHES(K, Id)                                                              \
  template <>                                                                                  \
  CALM_MULTIVERSION void count_patches(const SequenceDraws<K, Id>& draws, PatchTable& table) { \
    count_sequence(draws, table);                                                              \
  }

CALM_COUNT_PATCHES(4, int64_t)
CALM_COUNT_PATCHES(0, int64_t)
CALM_COUNT_PATCHES(4, int32_t)
CALM_COUNT_PATCHES(0, int32_t)

// weights[c] for c = 1..largest, zero where it rounds to zero.
CALM_MULTIVERSION void weigh_counts(const VoteLaw& law, int64_t largest,
                                    std::vector<double>& weights) {
  double product = 1.0;
  int64_t c = largest;
  for (; c >= 1 && !(product < kNegligibleWeight); --c) {
    weights[c] = rounded_weight(product);
    if (c > 1) product *= law.factor(c);
  }
  std::fill(weights.begin(), weights.begin() + c + 1, 0.0);
}

// The patches' weights added up, block by block: multiples of 2^-40, so a sum is exact in any
// order.
struct RunningWeight {
  static constexpr int64_t kBlock = 16;

  explicit RunningWeight(int64_t num_draws)
      : blocks(static_cast<size_t>((num_draws + kBlock - 1) / kBlock)) {}

  std::vector<double> blocks;
};

struct Tally {
  int64_t largest;
  int64_t num_distinct;
};

CALM_MULTIVERSION Tally tally(const std::vector<int32_t>& counts) {
  int32_t largest = 0;
  int32_t num_distinct = 0;
  for (const int32_t c : counts) {
    largest = std::max(largest, c);
    num_distinct += c > 0 ? 1 : 0;
  }
  return {largest, num_distinct};
}

// weights[c] is the weight of a patch that occurs c times, weights[0] = 0.
double add_up(const std::vector<int32_t>& counts, const std::vector<double>& weights,
              RunningWeight& running) {
  const int64_t size = static_cast<int64_t>(counts.size());
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += RunningWeight::kBlock) {
    const int64_t end = std::min(size, begin + RunningWeight::kBlock);
    double part[4] = {};
    for (int64_t i = begin; i < end; ++i) part[i % 4] += weights[counts[i]];
    const double sum = (part[0] + part[1]) + (part[2] + part[3]);
    running.blocks[begin / RunningWeight::kBlock] = sum;
    total += sum;
  }
  return total;
}

// The first draw at which the running sum passes the threshold.
int64_t find(const std::vector<int32_t>& counts, const std::vector<double>& weights,
             const RunningWeight& sums, double threshold) {
  const int64_t size = static_cast<int64_t>(counts.size());
  double running = 0.0;
  for (int64_t begin = 0; begin < size; begin += RunningWeight::kBlock) {
    const double sum = sums.blocks[begin / RunningWeight::kBlock];
    if (running + sum <= threshold) {
      running += sum;
      continue;
    }
    for (int64_t i = begin; i < std::min(size, begin + RunningWeight::kBlock); ++i) {
      running += weights[counts[i]];
      if (running > threshold) return i;
    }
  }
  // The threshold was rounded up to the total: the last patch that can be chosen.
  int64_t last = size - 1;
  while (weights[counts[last]] == 0.0) --last;
  return last;
}

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
template <int K, typename Id>
void vote(const VoteTask<Id>& task, int64_t begin, int64_t end) {
  const Draws<Id>& draws = task.draws;
  PatchTable table(draws.num_draws);
  RunningWeight running(draws.num_draws);
  std::vector<double> weights(static_cast<size_t>(draws.num_draws) + 1);
  const auto& counts = table.counts;
  for (int64_t s = begin; s < end; ++s) {
    count_patches(SequenceDraws<K, Id>{draws.patch(s, 0), draws.draw_stride, draws.num_draws,
                                       draws.patch_size},
                  table);
    const Tally found = tally(counts);
    weigh_counts(VoteLaw(task.exponent[s], draws.num_draws), found.largest, weights);
    const double total = add_up(counts, weights, running);
    const uint64_t row = static_cast<uint64_t>(task.rows == nullptr ? s : task.rows[s]);
    const double u = wide_uniform(task.seed, row, 0, Stream::kBatchTemperature);
    const int64_t winner = find(counts, weights, running, u * total);
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
    const auto votes = task.draws.patch_size == 4 ? vote<4, Id> : vote<0, Id>;
    torch::stable::parallel_for(0, num_sequences, grain(task.draws.num_draws),
                                [&](int64_t begin, int64_t end) { votes(task, begin, end); });
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
