// Counting equal patches by hash, on CPUs.
//
// Whether a draw brings a new patch is as good as random, and a branch on it is guessed wrong every
// other time. So nothing branches on it: all draws write into the table, the last one first, so
// that every slot ends with the first draw that hashed there; then each draw reads its slot back
// and compares itself with the draw it finds. Those that differ lost their slot to another patch, a
// few in a hundred, and go round again among themselves. In every round the first draw of each slot
// finds itself, so rounds end whatever the hashes are. Only slots written in the round are read:
// the table is never cleared.
//
// Patches of four ids, the usual ones, are hashed sixteen draws at a time where there is AVX-512. A
// slot then holds 20 more bits of the hash beside the draw's number, by which draws compare
// themselves, and the ids of all repeats are compared in one sweep at the end. If one differs,
// which takes two patches that share slot and bits, the sequence is counted over by comparing ids.
//
// Fewest bytes: the draws read once; table and lists stay in L1 at 200 draws.

#include "cpu/patch_counts.h"

#include <algorithm>
#include <bit>

#include "cpu/lanes.h"
#include "cpu/multiversion.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CALM_AVX512_PATCHES __attribute__((target("arch=x86-64-v4")))
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header says so of itself
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace calm {
namespace {

// Notes the first draw of the patch that draw i brings, or that i stays pending; returns how many
// are pending then.
template <int K, typename Id>
CALM_INLINE int64_t settle(const SequenceDraws<Id>& draws, int64_t i, int64_t num_pending,
                           PatchTable& table) {
  const int64_t size = K > 0 ? K : draws.patch_size;
  const int64_t first = table.slots[table.places[i]];
  const Id* a = draws[i];
  const Id* b = draws[first];
  Id difference = a[0] ^ b[0];
  for (int64_t k = 1; k < size; ++k) difference |= a[k] ^ b[k];
  table.firsts[i] = static_cast<int32_t>(first);
  table.pending[num_pending] = static_cast<int32_t>(i);
  return num_pending + static_cast<int64_t>(difference != 0);
}

template <int K, typename Id>
CALM_INLINE void count_by_ids(const SequenceDraws<Id>& draws, PatchTable& table) {
  const int shift = 64 - table.log2_slots;
  const int64_t size = K > 0 ? K : draws.patch_size;
  for (int64_t i = 0; i < draws.num_draws; ++i) {
    table.places[i] = static_cast<int32_t>(hash_patch(draws[i], size) >> shift);
  }
  for (int64_t i = draws.num_draws - 1; i >= 0; --i) {
    table.slots[table.places[i]] = static_cast<int32_t>(i);
  }
  int64_t num_pending = 0;
  for (int64_t i = 0; i < draws.num_draws; ++i) {
    num_pending = settle<K>(draws, i, num_pending, table);
  }
  while (num_pending > 0) {
    for (int64_t p = num_pending - 1; p >= 0; --p) {
      table.slots[table.places[table.pending[p]]] = table.pending[p];
    }
    const int64_t num_before = num_pending;
    num_pending = 0;
    for (int64_t p = 0; p < num_before; ++p) {
      num_pending = settle<K>(draws, table.pending[p], num_pending, table);
    }
  }
  std::fill_n(table.counts.begin(), draws.num_draws, 0);
  for (int64_t i = 0; i < draws.num_draws; ++i) ++table.counts[table.firsts[i]];
}

#define CALM_COUNT_BY_IDS(K, Id)                                                             \
  CALM_MULTIVERSION void count_##K##_by_ids(const SequenceDraws<Id>& draws, PatchTable& t) { \
    count_by_ids<K>(draws, t);                                                               \
  }

CALM_COUNT_BY_IDS(4, int64_t)
CALM_COUNT_BY_IDS(0, int64_t)
CALM_COUNT_BY_IDS(4, int32_t)
CALM_COUNT_BY_IDS(0, int32_t)

template <typename Id>
void count_any(const SequenceDraws<Id>& draws, PatchTable& table) {
  if (draws.patch_size == 4) {
    count_4_by_ids(draws, table);
  } else {
    count_0_by_ids(draws, table);
  }
}

CALM_MULTIVERSION int64_t list_lane_by_lane(const PatchTable& table, int32_t least,
                                            int32_t* chosen) {
  int64_t count = 0;
  for (int64_t i = 0; i < table.num_draws; ++i) {
    chosen[count] = static_cast<int32_t>(i);
    count += table.counts[i] > least ? 1 : 0;
  }
  return count;
}

#ifdef CALM_AVX512_PATCHES

constexpr int kNumberBits = 12;  // of an entry: the draw's number; the others are of the hash
constexpr int64_t kMostTaggedDraws = int64_t{1} << kNumberBits;
constexpr int32_t kNumberMask = (1 << kNumberBits) - 1;
constexpr int64_t kLanes = PatchTable::kVectorLanes;

// The factors of four ids in the hash: its polynomial, times a number that moves its differences to
// the upper bits.
constexpr uint64_t kFourthFactor = kPatchFinalizer;
constexpr uint64_t kThirdFactor = kFourthFactor * kPatchMultiplier;
constexpr uint64_t kSecondFactor = kThirdFactor * kPatchMultiplier;
constexpr uint64_t kFirstFactor = kSecondFactor * kPatchMultiplier;

// The ids of two draws.
CALM_AVX512_PATCHES CALM_INLINE __m512i load_two(const int64_t* a, const int64_t* b) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

CALM_AVX512_PATCHES CALM_INLINE __m512i load_two(const int32_t* a, const int32_t* b) {
  const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
  const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
  return _mm512_cvtepi32_epi64(_mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
}

// Half sums, in lanes 0 4 / 1 5 / 2 6 / 3 7, become the sums of draws a and b.
CALM_AVX512_PATCHES CALM_INLINE __m512i add_neighbours(__m512i a, __m512i b) {
  return _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
}

// Hashes of draws i .. i + 7; where there are fewer, the last draw takes the place of the others.
template <bool whole, typename Id>
CALM_AVX512_PATCHES CALM_INLINE __m512i hash_eight(const SequenceDraws<Id>& draws, int64_t i) {
  const __m512i factors =
      _mm512_set_epi64(kFourthFactor, kThirdFactor, kSecondFactor, kFirstFactor, kFourthFactor,
                       kThirdFactor, kSecondFactor, kFirstFactor);
  __m512i products[4];
#pragma GCC unroll 4
  for (int64_t pair = 0; pair < 4; ++pair) {
    int64_t a = i + 2 * pair;
    int64_t b = a + 1;
    if (!whole) {
      a = std::min(a, draws.num_draws - 1);
      b = std::min(b, draws.num_draws - 1);
    }
    products[pair] = _mm512_mullo_epi64(load_two(draws[a], draws[b]), factors);
  }
  // Half sums of draws 0 2 0 2 1 3 1 3 and 4 6 4 6 5 7 5 7.
  const __m512i front = add_neighbours(products[0], products[1]);
  const __m512i back = add_neighbours(products[2], products[3]);
  const __m512i first_half = _mm512_set_epi64(13, 9, 12, 8, 5, 1, 4, 0);
  const __m512i second_half = _mm512_set_epi64(15, 11, 14, 10, 7, 3, 6, 2);
  return _mm512_add_epi64(_mm512_permutex2var_epi64(front, first_half, back),
                          _mm512_permutex2var_epi64(front, second_half, back));
}

CALM_AVX512_PATCHES CALM_INLINE __m512i lane_numbers() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// Asks for the draws of the next sequence that lie where i .. i + 15 lie in this one. What neither
// cache nor the CPU's own prefetcher holds, a page of draws and the next, took half of the time.
template <typename Id>
CALM_AVX512_PATCHES CALM_INLINE void fetch_next(const SequenceDraws<Id>& draws, int64_t i) {
  const int64_t step = draws.stride * static_cast<int64_t>(sizeof(Id)) <= 32 ? 2 : 1;
  const int64_t end = std::min(draws.num_draws, i + kLanes);
  for (; i < end; i += step) _mm_prefetch(draws.next + i * draws.stride, _MM_HINT_T1);
}

// Slot and entry of each draw.
template <typename Id>
CALM_AVX512_PATCHES CALM_INLINE void place(const SequenceDraws<Id>& draws, PatchTable& table) {
  const __m512i even = _mm512_add_epi32(lane_numbers(), lane_numbers());
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  const __m512i number_mask = _mm512_set1_epi32(kNumberMask);
  const __m128i shift = _mm_cvtsi32_si128(32 - table.log2_slots);
  __m512i number = lane_numbers();
  for (int64_t i = 0; i < draws.num_draws; i += kLanes) {
    fetch_next(draws, i);
    const bool whole = i + kLanes <= draws.num_draws;
    const __m512i a = whole ? hash_eight<true>(draws, i) : hash_eight<false>(draws, i);
    const __m512i b = whole ? hash_eight<true>(draws, i + 8) : hash_eight<false>(draws, i + 8);
    const __m512i lower = _mm512_permutex2var_epi32(a, even, b);
    const __m512i upper = _mm512_permutex2var_epi32(a, odd, b);
    const __m512i entry = _mm512_or_si512(_mm512_andnot_si512(number_mask, lower), number);
    _mm512_storeu_si512(table.entries.data() + i, entry);
    _mm512_storeu_si512(table.places.data() + i, _mm512_srl_epi32(upper, shift));
    number = _mm512_add_epi32(number, _mm512_set1_epi32(kLanes));
  }
}

struct Settled {
  int64_t num_repeats;
  int64_t num_pending;
};

// Compares each draw with the one in its slot. The first of its kind is counted; a repeat goes on a
// list, which takes the place of `firsts`: its number and, 16 bits higher, that of the first.
CALM_AVX512_PATCHES CALM_INLINE Settled settle_by_tags(PatchTable& table) {
  const int64_t num_draws = table.num_draws;
  const __m512i number_mask = _mm512_set1_epi32(kNumberMask);
  Settled settled{};
  for (int64_t i = 0; i < num_draws; i += kLanes) {
    const int64_t left = num_draws - i;
    const auto live = static_cast<__mmask16>(left >= kLanes ? 0xFFFF : (1 << left) - 1);
    const __m512i own = _mm512_loadu_si512(table.entries.data() + i);
    const __m512i places = _mm512_loadu_si512(table.places.data() + i);
    const __m512i found = _mm512_mask_i32gather_epi32(own, live, places, table.slots.data(), 4);
    const __mmask16 later = _mm512_cmpneq_epi32_mask(own, found);
    const __mmask16 others = _mm512_cmpgt_epu32_mask(_mm512_xor_si512(own, found), number_mask);
    const __m512i number = _mm512_and_si512(own, number_mask);
    const auto firsts = static_cast<__mmask16>(live & ~later);
    _mm512_storeu_si512(table.counts.data() + i, _mm512_maskz_set1_epi32(firsts, 1));
    if (others != 0) {
      _mm512_storeu_si512(table.pending.data() + settled.num_pending,
                          _mm512_maskz_compress_epi32(others, number));
      settled.num_pending += std::popcount(static_cast<uint16_t>(others));
    }
    const auto repeats = static_cast<__mmask16>(later & ~others);
    const __m512i first = _mm512_and_si512(found, number_mask);
    const __m512i both = _mm512_or_si512(number, _mm512_slli_epi32(first, 16));
    _mm512_storeu_si512(table.firsts.data() + settled.num_repeats,
                        _mm512_maskz_compress_epi32(repeats, both));
    settled.num_repeats += std::popcount(static_cast<uint16_t>(repeats));
  }
  return settled;
}

// The draws that lost their slot, round by round; returns how many repeats there are then.
CALM_INLINE int64_t settle_pending(PatchTable& table, const Settled& settled) {
  int64_t num_repeats = settled.num_repeats;
  int64_t num_pending = settled.num_pending;
  while (num_pending > 0) {
    for (int64_t p = num_pending - 1; p >= 0; --p) {
      table.slots[table.places[table.pending[p]]] = table.entries[table.pending[p]];
    }
    const int64_t num_before = num_pending;
    num_pending = 0;
    for (int64_t p = 0; p < num_before; ++p) {
      const int32_t i = table.pending[p];
      const int32_t found = table.slots[table.places[i]];
      const int32_t first = found & kNumberMask;
      if (((found ^ table.entries[i]) & ~kNumberMask) != 0) {
        table.pending[num_pending++] = i;
      } else if (first == i) {
        table.counts[i] = 1;
      } else {
        table.firsts[num_repeats++] = i | (first << 16);
      }
    }
  }
  return num_repeats;
}

// Where two draws differ.
CALM_AVX512_PATCHES CALM_INLINE __m256i difference(const int64_t* a, const int64_t* b) {
  return _mm256_xor_si256(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)));
}

CALM_AVX512_PATCHES CALM_INLINE __m256i difference(const int32_t* a, const int32_t* b) {
  return _mm256_zextsi128_si256(
      _mm_xor_si128(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)),
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(b))));
}

// Counts the repeats; false if one is not what its tag said.
template <typename Id>
CALM_AVX512_PATCHES CALM_INLINE bool count_repeats(const SequenceDraws<Id>& draws,
                                                   PatchTable& table, int64_t num_repeats) {
  const int32_t* const repeats = table.firsts.data();
  int32_t* const counts = table.counts.data();
  __m256i all = _mm256_setzero_si256();
  for (int64_t r = 0; r < num_repeats; ++r) {
    const int32_t first = repeats[r] >> 16;
    all = _mm256_or_si256(all, difference(draws[repeats[r] & kNumberMask], draws[first]));
    ++counts[first];
  }
  return _mm256_testz_si256(all, all) != 0;
}

template <typename Id>
CALM_AVX512_PATCHES bool count_by_tags(const SequenceDraws<Id>& draws, PatchTable& table) {
  place(draws, table);
  for (int64_t i = draws.num_draws - 1; i >= 0; --i) {
    table.slots[table.places[i]] = table.entries[i];
  }
  return count_repeats(draws, table, settle_pending(table, settle_by_tags(table)));
}

// Compressed into a register and stored whole: a masked compressing store is microcode on some
// CPUs.
CALM_AVX512_PATCHES int64_t list_compressed(const PatchTable& table, int32_t least,
                                            int32_t* chosen) {
  const __m512i limit = _mm512_set1_epi32(least);
  int64_t count = 0;
  for (int64_t i = 0; i < table.num_draws; i += kLanes) {
    const __m512i counts = _mm512_loadu_si512(table.counts.data() + i);
    const __mmask16 above = _mm512_cmpgt_epi32_mask(counts, limit);
    const __m512i number =
        _mm512_add_epi32(lane_numbers(), _mm512_set1_epi32(static_cast<int32_t>(i)));
    _mm512_storeu_si512(chosen + count, _mm512_maskz_compress_epi32(above, number));
    count += std::popcount(static_cast<uint16_t>(above));
  }
  return count;
}

bool has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  return has;
}

template <typename Id>
bool counted_by_tags(const SequenceDraws<Id>& draws, PatchTable& table) {
  return draws.patch_size == 4 && draws.num_draws <= kMostTaggedDraws && has_avx512() &&
         count_by_tags(draws, table);
}

#else

bool has_avx512() { return false; }

int64_t list_compressed(const PatchTable& table, int32_t least, int32_t* chosen) {
  return list_lane_by_lane(table, least, chosen);
}

template <typename Id>
bool counted_by_tags(const SequenceDraws<Id>&, PatchTable&) {
  return false;
}

#endif

}  // namespace

void count_patches(const SequenceDraws<int64_t>& draws, PatchTable& table) {
  if (!counted_by_tags(draws, table)) count_any(draws, table);
}

void count_patches(const SequenceDraws<int32_t>& draws, PatchTable& table) {
  if (!counted_by_tags(draws, table)) count_any(draws, table);
}

int64_t list_counts_above(const PatchTable& table, int32_t least, int32_t* chosen) {
  return has_avx512() ? list_compressed(table, least, chosen)
                      : list_lane_by_lane(table, least, chosen);
}

}  // namespace calm
