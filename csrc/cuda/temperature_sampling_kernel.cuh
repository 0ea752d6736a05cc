// Temperature sampling from draws: the device code of the vote and of a round of the exact method,
// free of torch.
//
// Vote. Mapping: one block a sequence. Its draws enter an open-addressing table in shared memory
// whose slots name a draw; the hash finds a slot, the comparison of all K ids decides, so patches
// of one hash stay apart. A patch ends in one slot whichever thread comes first (slots are never
// freed), and an atomic minimum leaves there the draw where it occurs first: what follows depends
// on nothing but the draws. The weights are products from the largest count down, each rounded as
// in the specification, so one thread multiplies them; the others make the factors (the divisions)
// beforehand. Every weight is a multiple of one unit and all sums are exact, so the running sum
// over the draws is a scan in any order.
// Fewest bytes: ids read once from memory (8 N K), again from cache for each comparison; the result
// written once. Operations: N hashes of K multiplies; the chain of at most N multiplies is the
// longest wait. Shared memory: 4 bytes a slot (2N slots rounded up to a power of two), 4 a draw.
//
// Exact. Mapping: one warp a sequence. The lanes compare 32 draws with the candidate at once; the
// state machine, the same in every lane, walks the bits of the vote. Fewest bytes: as much of each
// draw as decides the comparison, one token as a rule; the state read and written once.
#pragma once

#include <cstdint>

#include "common/temperature.h"
#include "cuda/shared_memory.cuh"

namespace calm {

constexpr int kVoteThreads = 128;
constexpr int kVoteWarps = kVoteThreads / 32;
// The most draws a sequence may have: 96 KiB of shared memory, which every supported chip has.
constexpr int64_t kVoteMostDraws = 8192;
constexpr int kExactWarpsPerBlock = 4;
constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int32_t kFreeSlot = 0x7fffffff;

// Where a vote's arrays lie in dynamic shared memory.
struct VoteLayout {
  int log2_slots;
  int32_t num_slots;
  int64_t counts_at;  // bytes
  int64_t slots_of_at;
  int64_t bytes;

  CALM_HOST_DEVICE explicit VoteLayout(int64_t num_draws) {
    log2_slots = vote_table_log2(num_draws);
    num_slots = 1 << log2_slots;
    counts_at = 4 * static_cast<int64_t>(num_slots);
    slots_of_at = counts_at + (num_draws + 1) / 2 * 4;
    bytes = slots_of_at + (num_draws + 1) / 2 * 4;
  }
};

template <typename Id>
__device__ inline bool equal_patches(const Id* a, const Id* b, int64_t patch_size) {
  for (int64_t k = 0; k < patch_size; ++k) {
    if (a[k] != b[k]) return false;
  }
  return true;
}

// The slot of a draw's patch, which it takes if no draw has yet; `is_new` says whether it did.
template <typename Id>
__device__ inline int32_t enter_draw(int32_t* slots, const VoteLayout& layout,
                                     const Draws<Id>& draws, int64_t sequence, int32_t draw,
                                     bool& is_new) {
  const Id* ids = draws.patch(sequence, draw);
  const uint64_t hash = hash_patch(ids, draws.patch_size);
  int32_t at = static_cast<int32_t>(hash >> (64 - layout.log2_slots));
  for (;; at = (at + 1) & (layout.num_slots - 1)) {
    const int32_t other = atomicCAS(&slots[at], kFreeSlot, draw);
    is_new = other == kFreeSlot;
    if (is_new) return at;
    if (equal_patches(ids, draws.patch(sequence, other), draws.patch_size)) {
      atomicMin(&slots[at], draw);
      return at;
    }
  }
}

// Counts fit 16 bits; two share a word, because atomics have no fewer than 32.
__device__ inline void increment(uint32_t* counts, int32_t i) {
  atomicAdd(&counts[i / 2], i % 2 == 0 ? 1u : 1u << 16);
}
__device__ inline int32_t count_of(const uint32_t* counts, int32_t i) {
  return static_cast<int32_t>(counts[i / 2] >> (i % 2 == 0 ? 0 : 16) & 0xffffu);
}

// Turns factors into weights in place; weights[c-1] belongs to count c. Returns the least count
// whose weight does not round to zero; those below are left as they are.
__device__ inline int32_t multiply_factors(double* weights, int32_t largest) {
  double product = 1.0;
  double factor = weights[largest - 1];
  for (int32_t c = largest;; --c) {
    // Read ahead of the store, so that the chain waits for the multiplication alone.
    const double next = c > 1 ? weights[c - 2] : 1.0;
    weights[c - 1] = rounded_weight(product);
    if (c == 1) return 1;
    product *= factor;
    factor = next;
    if (product < kNegligibleWeight) return c;
  }
}

// The sum over the threads before this one, of values whose sums are exact; `total` over all.
__device__ inline double exclusive_sum(double value, double* warp_sums, double& total) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  double inclusive = value;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const double before = __shfl_up_sync(kWholeWarp, inclusive, static_cast<unsigned>(lanes));
    if (lane >= lanes) inclusive += before;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  double base = 0.0;
  total = 0.0;
  for (int w = 0; w < kVoteWarps; ++w) {
    if (w < warp) base += warp_sums[w];
    total += warp_sums[w];
  }
  return base + (inclusive - value);
}

template <typename Id>
struct VoteArguments {
  Draws<Id> draws;
  const double* exponent;
  const int64_t* rows;  // nullptr: 0, 1, 2, ...
  const int64_t* seed;
  Id* patches;
  int64_t* count;
  int64_t* num_distinct;
};

// Dynamic shared memory: VoteLayout(num_draws).bytes. Grid: one block a sequence.
template <typename Id>
__global__ void __launch_bounds__(kVoteThreads) vote_kernel(const VoteArguments<Id> arguments) {
  CALM_DYNAMIC_SHARED_ARRAY(double, vote_shared);
  CALM_SHARED_ARRAY(double, warp_sums, kVoteWarps);
  // Largest count, number of distinct patches, least count with a weight.
  CALM_SHARED_ARRAY(int32_t, summary, 3);
  const Draws<Id> draws = arguments.draws;
  const VoteLayout layout(draws.num_draws);
  unsigned char* const bytes = reinterpret_cast<unsigned char*>(vote_shared);
  int32_t* const slots = reinterpret_cast<int32_t*>(bytes);
  uint32_t* const counts = reinterpret_cast<uint32_t*>(bytes + layout.counts_at);
  uint16_t* const slots_of = reinterpret_cast<uint16_t*>(bytes + layout.slots_of_at);
  const int64_t sequence = static_cast<int64_t>(blockIdx.x);
  const int32_t num_draws = static_cast<int32_t>(draws.num_draws);
  const int32_t thread = static_cast<int32_t>(threadIdx.x);

  for (int32_t i = thread; i < layout.num_slots; i += kVoteThreads) slots[i] = kFreeSlot;
  for (int32_t i = thread; i < (num_draws + 1) / 2; i += kVoteThreads) counts[i] = 0;
  if (thread < 2) summary[thread] = 0;
  __syncthreads();

  int32_t num_new = 0;
  for (int32_t i = thread; i < num_draws; i += kVoteThreads) {
    bool is_new = false;
    slots_of[i] = static_cast<uint16_t>(enter_draw(slots, layout, draws, sequence, i, is_new));
    num_new += is_new;
  }
  if (num_new > 0) atomicAdd(&summary[1], num_new);
  __syncthreads();

  // From here on a patch is the draw where it occurs first: only that draw has a count.
  for (int32_t i = thread; i < num_draws; i += kVoteThreads) increment(counts, slots[slots_of[i]]);
  __syncthreads();
  int32_t most = 0;
  for (int32_t i = thread; i < num_draws; i += kVoteThreads) {
    const int32_t c = count_of(counts, i);
    most = c > most ? c : most;
  }
  if (most > 0) atomicMax(&summary[0], most);
  __syncthreads();

  // The slots are done with: the weights take their place (8 bytes a draw, as the slots have).
  double* const weights = vote_shared;
  const int32_t largest = summary[0];
  const VoteLaw law(arguments.exponent[sequence], draws.num_draws);
  for (int32_t j = 2 + thread; j <= largest; j += kVoteThreads) weights[j - 1] = law.factor(j);
  if (thread == 0) weights[0] = 1.0;
  __syncthreads();
  if (thread == 0) summary[2] = multiply_factors(weights, largest);
  __syncthreads();
  const int32_t least = summary[2];

  // Neighbouring draws belong to one thread, so that its sum stands for an interval of the line.
  const int32_t per_thread = (num_draws + kVoteThreads - 1) / kVoteThreads;
  const int32_t begin = thread * per_thread;
  const int32_t end = begin + per_thread < num_draws ? begin + per_thread : num_draws;
  double own = 0.0;
  for (int32_t i = begin; i < end; ++i) {
    const int32_t c = count_of(counts, i);
    if (c >= least) own += weights[c - 1];
  }
  double total = 0.0;
  double running = exclusive_sum(own, warp_sums, total);
  const int64_t row = arguments.rows == nullptr ? sequence : arguments.rows[sequence];
  const double u = wide_uniform(static_cast<uint64_t>(*arguments.seed), static_cast<uint64_t>(row),
                                0, Stream::kBatchTemperature);
  const double threshold = u * total;
  if (running > threshold || running + own <= threshold) return;
  // One thread is left, the one in whose interval the threshold lies.
  for (int32_t i = begin; i < end; ++i) {
    const int32_t c = count_of(counts, i);
    if (c < least) continue;
    running += weights[c - 1];
    if (running <= threshold) continue;
    const Id* winner = draws.patch(sequence, i);
    for (int64_t k = 0; k < draws.patch_size; ++k) {
      arguments.patches[sequence * draws.patch_size + k] = winner[k];
    }
    arguments.count[sequence] = c;
    arguments.num_distinct[sequence] = summary[1];
    return;
  }
}

template <typename Id>
struct ExactArguments {
  Draws<Id> draws;
  const Id* candidate;      // contiguous, as all below
  const int64_t* progress;  // [num_sequences, kExactColumns]
  const int64_t* num_equal;
  const double* fraction;
  const int64_t* rows;
  const int64_t* seed;
  int64_t max_draws;
  Id* candidate_out;
  int64_t* progress_out;
};

template <typename Id>
__global__ void __launch_bounds__(kExactWarpsPerBlock * 32)
    exact_kernel(const ExactArguments<Id> arguments) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warp = static_cast<int64_t>(threadIdx.x) / 32;
  const int64_t sequence = static_cast<int64_t>(blockIdx.x) * kExactWarpsPerBlock + warp;
  const Draws<Id> draws = arguments.draws;
  if (sequence >= draws.num_sequences) return;
  const int64_t* in = arguments.progress + sequence * kExactColumns;
  ExactProgress state{in[0], in[1], in[2], in[3], in[4] > 0};
  const ExactLaw law{arguments.num_equal[sequence], arguments.fraction[sequence],
                     static_cast<uint64_t>(*arguments.seed),
                     static_cast<uint64_t>(arguments.rows[sequence])};
  const Id* candidate = arguments.candidate + sequence * draws.patch_size;

  int64_t first_voted = 0;  // draws first_voted .. first_voted + 31 have bits in `equal`
  unsigned equal = 0;
  bool voted = false;
  for (int64_t i = 0; i < draws.num_draws; ++i) {
    if (state.accepted != 0 || state.num_draws >= arguments.max_draws) break;
    if (state.matches == 0) {
      candidate = draws.patch(sequence, i);
      voted = false;
      consume_draw(state, true, law);
      continue;
    }
    if (!voted || i >= first_voted + 32) {
      first_voted = i;
      voted = true;
      const int64_t mine = i + lane;
      const bool same = mine < draws.num_draws &&
                        equal_patches(draws.patch(sequence, mine), candidate, draws.patch_size);
      equal = __ballot_sync(kWholeWarp, same);
    }
    consume_draw(state, (equal >> (i - first_voted) & 1u) != 0, law);
  }

  for (int64_t k = lane; k < draws.patch_size; k += 32) {
    arguments.candidate_out[sequence * draws.patch_size + k] = candidate[k];
  }
  if (lane == 0) {
    int64_t* out = arguments.progress_out + sequence * kExactColumns;
    out[0] = state.matches;
    out[1] = state.trial;
    out[2] = state.num_draws;
    out[3] = state.num_uniforms;
    out[4] = state.accepted;
  }
}

}  // namespace calm
