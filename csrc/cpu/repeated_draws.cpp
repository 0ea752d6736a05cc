// Which draws of some sequences share all tokens so far with enough others.
//
// Draws are numbered draw by draw: row s * A + a is draw s of sequence a. Draws that were equal up
// to the token before have one group number; a table with open addressing finds those that are
// still equal with this token.
//
// Work: one look at the table a draw, about. Fewest bytes: three integers a draw read, two written.

#include <cstdint>
#include <tuple>
#include <vector>

#include "cpu/registration.h"

namespace calm {
namespace {

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;
constexpr uint64_t kOdd = 0xC2B2AE3D27D4EB4F;

// For each draw the first one that is equal to it, and how many equal it there.
struct Counts {
  std::vector<int64_t> firsts;
  std::vector<int64_t> counts;
};

Counts count_equal(const int64_t* groups, const int64_t* tokens, int64_t num_draws) {
  int log2_slots = 1;
  while ((int64_t{1} << log2_slots) < 2 * num_draws) ++log2_slots;
  const size_t mask = (size_t{1} << log2_slots) - 1;
  std::vector<int64_t> slots(mask + 1, -1);
  Counts result{std::vector<int64_t>(static_cast<size_t>(num_draws)),
                std::vector<int64_t>(static_cast<size_t>(num_draws))};
  for (int64_t i = 0; i < num_draws; ++i) {
    const uint64_t key =
        (static_cast<uint64_t>(groups[i]) * kOdd + static_cast<uint64_t>(tokens[i])) * kGolden;
    size_t slot = static_cast<size_t>(key >> (64 - log2_slots));
    while (slots[slot] >= 0 &&
           (groups[slots[slot]] != groups[i] || tokens[slots[slot]] != tokens[i])) {
      slot = (slot + 1) & mask;
    }
    if (slots[slot] < 0) slots[slot] = i;
    result.firsts[static_cast<size_t>(i)] = slots[slot];
    ++result.counts[static_cast<size_t>(slots[slot])];
  }
  return result;
}

std::tuple<Tensor, Tensor> repeated_draws(const Tensor& rows_in, const Tensor& groups_in,
                                          const Tensor& tokens_in, const Tensor& fewest_in) {
  const Tensor rows = torch::stable::contiguous(rows_in);
  const Tensor groups = torch::stable::contiguous(groups_in);
  const Tensor tokens = torch::stable::contiguous(tokens_in);
  const Tensor fewest = torch::stable::contiguous(fewest_in);
  const int64_t num_draws = rows.size(0);
  const int64_t num_sequences = fewest.size(0);
  const int64_t* const numbers = rows.const_data_ptr<int64_t>();
  const int64_t* const needed = fewest.const_data_ptr<int64_t>();
  const auto [firsts, counts] =
      count_equal(groups.const_data_ptr<int64_t>(), tokens.const_data_ptr<int64_t>(), num_draws);
  std::vector<int64_t> kept;
  kept.reserve(static_cast<size_t>(num_draws));
  for (int64_t i = 0; i < num_draws; ++i) {
    const int64_t first = firsts[static_cast<size_t>(i)];
    if (counts[static_cast<size_t>(first)] >= needed[numbers[i] % num_sequences]) kept.push_back(i);
  }
  const int64_t num_kept = static_cast<int64_t>(kept.size());
  Tensor kept_rows = torch::stable::new_empty(rows, {num_kept});
  Tensor kept_groups = torch::stable::new_empty(rows, {num_kept});
  for (int64_t j = 0; j < num_kept; ++j) {
    const int64_t i = kept[static_cast<size_t>(j)];
    kept_rows.mutable_data_ptr<int64_t>()[j] = numbers[i];
    kept_groups.mutable_data_ptr<int64_t>()[j] = firsts[static_cast<size_t>(i)];
  }
  return {kept_rows, kept_groups};
}

}  // namespace
}  // namespace calm

STABLE_TORCH_LIBRARY_IMPL(calm_kernels, CPU, m) {
  m.impl("repeated_draws", TORCH_BOX(&calm::repeated_draws));
}
