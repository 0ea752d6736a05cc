// Which draws of a sequence are the same patch: the counts that the vote weighs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/temperature.h"

namespace calm {

// The patches of one sequence; draw i begins at ids + i * stride.
template <typename Id>
struct SequenceDraws {
  const Id* ids;
  int64_t stride;
  int64_t num_draws;
  int64_t patch_size;
  const Id* next;  // of the sequence to be counted next, fetched meanwhile; itself if there is none

  const Id* operator[](int64_t draw) const { return ids + draw * stride; }
};

// Room for the counts of one sequence after another, and the counts themselves. Buffers are written
// in whole vectors, so they end one vector late.
struct PatchTable {
  static constexpr size_t kVectorLanes = 16;

  explicit PatchTable(int64_t num_draws)
      : log2_slots(2 + vote_table_log2(num_draws)),
        slots(size_t{1} << log2_slots),
        places(static_cast<size_t>(num_draws) + kVectorLanes),
        entries(places.size()),
        pending(places.size()),
        firsts(places.size()),
        counts(places.size()),
        num_draws(num_draws) {}

  int log2_slots;
  std::vector<int32_t> slots;
  std::vector<int32_t> places;   // each draw's slot
  std::vector<int32_t> entries;  // what it writes there, where that is not its number alone
  std::vector<int32_t> pending;  // draws that lost their slot to another patch
  std::vector<int32_t> firsts;   // where each draw's patch occurs first
  std::vector<int32_t> counts;   // how often it occurs; 0 for draws that repeat an earlier one
  int64_t num_draws;
};

// Fills table.counts.
void count_patches(const SequenceDraws<int64_t>& draws, PatchTable& table);
void count_patches(const SequenceDraws<int32_t>& draws, PatchTable& table);

// The draws whose count exceeds `least`, in order, into `chosen`, which has room for them all and a
// vector more; returns how many.
int64_t list_counts_above(const PatchTable& table, int32_t least, int32_t* chosen);

}  // namespace calm
