// Embedding with token dropout and flatten, its gradient, and the gather-sum of a folded encoder:
// the device code, free of torch. Matmuls between them go through torch.
//
// Fewest bytes, for n = P K tokens of w bytes an element: embed_flatten n (ids + 8 + 2 H w), its
// gradient n (16 + H w) + V H w, the gather-sum n (ids + H w) + P H w. All are bound by memory; a
// row of H = 512 bfloat16 elements is 1 KiB, two loads of 16 bytes a lane.
//
// embed_flatten: a warp a token. It copies bits, so there is one kernel for all dtypes and a unit
// of 16 bytes wherever a row consists of such.
//
// Gradient: atomics would sum in an order that differs from run to run (and, in 16 bits, round
// after every token). Here the tokens come sorted by id, equal ids in the order of their places:
//   1. a warp sums a tile of 32 sorted tokens over 32 pieces of 16 bytes. An id that lies in the
//      tile alone is written; a sum of an id that goes on in a neighbouring tile is kept aside.
//   2. a block adds up what was kept of one id: the warps every eighth tile, then warp 0 the eight.
// Tiles depend on nothing but the tokens, so every run gives the same bits. A frequent id (dropped
// tokens are all id 0) costs no more than others in step 1, and n / 256 additions at most in
// step 2.
//
// Gather-sum: a warp a patch, a lane a piece of 16 bytes of K rows, summed in float.
#pragma once

#include <cassert>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "common/patch_codec.h"
#include "cuda/energy_score_types.cuh"
#include "cuda/shared_memory.cuh"

namespace calm {

constexpr int kCodecWarps = 8;
constexpr int kCodecThreads = 32 * kCodecWarps;
// Rows that a warp asks for before it adds the first of them.
constexpr int kRowsInFlight = 4;

__device__ inline bool is_token(int64_t id, int64_t vocab_size) {
  return static_cast<uint64_t>(id) < static_cast<uint64_t>(vocab_size);
}

// What torch does for an index outside of a tensor: the context is lost.
__device__ inline void require_tokens(bool all_are_tokens) {
  if (all_are_tokens) return;
#ifdef CALM_SIMT
  throw std::out_of_range("a token id lies outside of the vocabulary");
#else
  assert(!"a token id lies outside of the vocabulary");
  __trap();
#endif
}

template <typename Id>
struct EmbedArguments {
  const Id* ids;  // [P, K]
  int64_t num_tokens;
  int64_t patch_size;
  int64_t vocab_size;
  int64_t units_per_row;
  TokenDropout dropout;
  int64_t* used_ids;  // [P, K]
};

// table [V, units_per_row], flat [P * K, units_per_row]
template <typename Unit, typename Id>
__global__ void __launch_bounds__(kCodecThreads)
    embed_flatten_kernel(const Unit* __restrict__ table, Unit* __restrict__ flat,
                         const EmbedArguments<Id> arguments) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kCodecWarps + threadIdx.x / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kCodecWarps;
  for (int64_t t = warp; t < arguments.num_tokens; t += step) {
    auto id = static_cast<int64_t>(arguments.ids[t]);
    require_tokens(is_token(id, arguments.vocab_size));
    const int64_t patch = t / arguments.patch_size;
    if (arguments.dropout.drops(patch, t - patch * arguments.patch_size)) id = 0;
    if (lane == 0) arguments.used_ids[t] = id;
    const Unit* from = table + id * arguments.units_per_row;
    Unit* to = flat + t * arguments.units_per_row;
    // Two loads of a lane on their way together: a row of 1 KiB.
    for (int64_t u = lane; u < arguments.units_per_row; u += 64) {
      const bool has_other = u + 32 < arguments.units_per_row;
      const Unit one = from[u];
      const Unit other = from[has_other ? u + 32 : u];
      to[u] = one;
      if (has_other) to[u + 32] = other;
    }
  }
}

// Neighbouring columns of a row: 16 bytes of it, or one element where rows do not consist of such.
template <typename T, bool kWide>
struct Columns {
  static constexpr int kCount = kWide ? 16 / static_cast<int>(sizeof(T)) : 1;
  using Sum = Compute<T>;
  struct Element {
    T value;
    __device__ Sum operator[](int) const { return widen(value); }
  };
  using Loaded = std::conditional_t<kWide, Piece<T, kCount>, Element>;

  __device__ static Loaded load(const T* row) {
    if constexpr (kWide) {
      return load_piece<T, kCount>(row, true);
    } else {
      return {*row};
    }
  }
  __device__ static void add(const Loaded& loaded, Sum (&sum)[kCount]) {
    CALM_UNROLL
    for (int i = 0; i < kCount; ++i) sum[i] += loaded[i];
  }
  __device__ static void set_zero(Sum (&sum)[kCount]) {
    CALM_UNROLL
    for (int i = 0; i < kCount; ++i) sum[i] = Sum(0);
  }
  __device__ static void write(T* row, const Sum (&sum)[kCount]) {
    if constexpr (kWide) {
      Piece<T, kCount> piece;
      piece.set(sum);
      store_piece(row, piece);
    } else {
      *row = narrow<T>(sum[0]);
    }
  }
};

template <typename T>
struct EmbedGradientArguments {
  const T* grad_flat;     // [n, width]
  const int32_t* ids;     // [n], sorted
  const int64_t* tokens;  // [n], the row of grad_flat that a sorted id belongs to
  int64_t num_tokens;
  int64_t vocab_size;
  int64_t width;
  // [tiles, 2, width]: of a tile's first id if that goes on from the tile before ("head"), of its
  // last one if that begins here and goes on in the next ("tail").
  Compute<T>* partial;
  T* grad;  // [V, width], zero

  __device__ Compute<T>* head(int64_t tile) const { return partial + 2 * tile * width; }
  __device__ Compute<T>* tail(int64_t tile) const { return head(tile) + width; }
  // Whether the id at a place is also that of the place before.
  __device__ bool continues(int64_t place) const {
    return place > 0 && place < num_tokens && ids[place] == ids[place - 1];
  }
};

// grid (tiles / kCodecWarps, pieces of a row / 32)
template <typename T, bool kWide>
__global__ void __launch_bounds__(kCodecThreads)
    embed_gradient_tile_kernel(const EmbedGradientArguments<T> arguments) {
  using Piece = Columns<T, kWide>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kCodecWarps + threadIdx.x / 32;
  const int64_t begin = tile * kTileTokens;
  if (begin >= arguments.num_tokens) return;
  const int64_t left = arguments.num_tokens - begin;
  const int count = static_cast<int>(left < kTileTokens ? left : kTileTokens);
  // A lane keeps one token of the tile; all lanes walk the tokens together.
  const int64_t mine = begin + (lane < count ? lane : 0);
  const int32_t lane_id = arguments.ids[mine];
  const int64_t lane_token = arguments.tokens[mine];
  require_tokens(is_token(lane_id, arguments.vocab_size));
  const bool from_before = arguments.continues(begin);
  const bool goes_on = arguments.continues(begin + count);

  const int64_t column = (static_cast<int64_t>(blockIdx.y) * 32 + lane) * Piece::kCount;
  const bool exists = column < arguments.width;
  const T* rows = arguments.grad_flat + (exists ? column : 0);
  Compute<T> sum[Piece::kCount];
  Piece::set_zero(sum);
  bool is_first = true;
  for (int base = 0; base < count; base += kRowsInFlight) {
    typename Piece::Loaded row[kRowsInFlight];
    CALM_UNROLL
    for (int r = 0; r < kRowsInFlight; ++r) {
      // Past the last token: that one again, not used.
      const int j = base + r < count ? base + r : count - 1;
      const int64_t token = __shfl_sync(kAllLanes, lane_token, j);
      row[r] = Piece::load(rows + token * arguments.width);
    }
    CALM_UNROLL
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int j = base + r;
      const int32_t id = __shfl_sync(kAllLanes, lane_id, j % 32);
      const int32_t next = __shfl_sync(kAllLanes, lane_id, (j + 1) % 32);
      if (j >= count) continue;
      Piece::add(row[r], sum);
      const bool is_last = j + 1 == count;
      if (!is_last && id == next) continue;
      const bool aside = is_first && from_before;
      if (exists && (aside || (is_last && goes_on))) {
        Compute<T>* kept = aside ? arguments.head(tile) : arguments.tail(tile);
        CALM_UNROLL
        for (int i = 0; i < Piece::kCount; ++i) kept[column + i] = sum[i];
      } else if (exists) {
        Piece::write(arguments.grad + id * arguments.width + column, sum);
      }
      Piece::set_zero(sum);
      is_first = false;
    }
  }
}

// The first place from `low` on whose id is greater.
__device__ inline int64_t end_of_id(const int32_t* ids, int64_t low, int64_t high, int32_t id) {
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (ids[middle] <= id) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// grid (tiles, pieces of a row / 32): the block of the tile where an id of several tiles begins.
template <typename T, bool kWide>
__global__ void __launch_bounds__(kCodecThreads)
    embed_gradient_join_kernel(const EmbedGradientArguments<T> arguments) {
  using Piece = Columns<T, kWide>;
  CALM_SHARED_ARRAY(Compute<T>, sums, kCodecWarps * 32 * Piece::kCount);
  const int64_t tile = blockIdx.x;
  const int64_t next = (tile + 1) * kTileTokens;
  if (!arguments.continues(next)) return;
  const int32_t id = arguments.ids[next];
  const int64_t begin = tile * kTileTokens;
  if (arguments.ids[begin] == id && arguments.continues(begin)) return;
  const int64_t end = end_of_id(arguments.ids, next, arguments.num_tokens, id);
  const int64_t last = (end - 1) / kTileTokens;

  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t column = (static_cast<int64_t>(blockIdx.y) * 32 + lane) * Piece::kCount;
  const bool exists = column < arguments.width;
  Compute<T> sum[Piece::kCount];
  Piece::set_zero(sum);
  for (int64_t other = tile + warp; exists && other <= last; other += kCodecWarps) {
    const Compute<T>* kept = other == tile ? arguments.tail(tile) : arguments.head(other);
    CALM_UNROLL
    for (int i = 0; i < Piece::kCount; ++i) sum[i] += kept[column + i];
  }
  CALM_UNROLL
  for (int i = 0; i < Piece::kCount; ++i) {
    // Lanes side by side, so that no two of a warp meet in a bank.
    sums[(warp * Piece::kCount + i) * 32 + lane] = sum[i];
  }
  __syncthreads();
  if (warp != 0 || !exists) return;
  for (int other = 1; other < kCodecWarps; ++other) {
    CALM_UNROLL
    for (int i = 0; i < Piece::kCount; ++i) {
      sum[i] += sums[(other * Piece::kCount + i) * 32 + lane];
    }
  }
  Piece::write(arguments.grad + id * arguments.width + column, sum);
}

template <typename T, typename Id>
struct GatherArguments {
  const Id* ids;    // [P, K]
  const T* tables;  // [K, V, width]
  const T* bias;    // [width]
  int64_t num_patches;
  int64_t patch_size;
  int64_t vocab_size;
  int64_t width;
  T* out;  // [P, width]
};

template <typename T, bool kWide, typename Id>
__global__ void __launch_bounds__(kCodecThreads)
    gather_sum_kernel(const GatherArguments<T, Id> arguments) {
  using Piece = Columns<T, kWide>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kCodecWarps + threadIdx.x / 32;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kCodecWarps;
  const int64_t table_size = arguments.vocab_size * arguments.width;
  for (int64_t p = warp; p < arguments.num_patches; p += step) {
    const Id* ids = arguments.ids + p * arguments.patch_size;
    for (int64_t d = static_cast<int64_t>(lane) * Piece::kCount; d < arguments.width;
         d += 32 * Piece::kCount) {
      Compute<T> sum[Piece::kCount];
      Piece::set_zero(sum);
      Piece::add(Piece::load(arguments.bias + d), sum);
      for (int64_t base = 0; base < arguments.patch_size; base += kRowsInFlight) {
        // All ids, then all rows, then their sum: a warp waits for memory twice, not 2 K times.
        int64_t id[kRowsInFlight];
        bool all_are_tokens = true;
        CALM_UNROLL
        for (int r = 0; r < kRowsInFlight; ++r) {
          id[r] = base + r < arguments.patch_size ? static_cast<int64_t>(ids[base + r]) : 0;
          all_are_tokens = all_are_tokens && is_token(id[r], arguments.vocab_size);
        }
        require_tokens(all_are_tokens);
        typename Piece::Loaded row[kRowsInFlight];
        CALM_UNROLL
        for (int r = 0; r < kRowsInFlight; ++r) {
          const int64_t k = base + r < arguments.patch_size ? base + r : 0;
          row[r] = Piece::load(arguments.tables + k * table_size + id[r] * arguments.width + d);
        }
        CALM_UNROLL
        for (int r = 0; r < kRowsInFlight; ++r) {
          if (base + r < arguments.patch_size) Piece::add(row[r], sum);
        }
      }
      Piece::write(arguments.out + p * arguments.width + d, sum);
    }
  }
}

}  // namespace calm
