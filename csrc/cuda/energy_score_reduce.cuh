// Sums over the lanes that share a position.
//
// A position is worked on by `width` neighbouring lanes of a warp. Each lane arrives with partial
// sums of all columns (pairs, moments, target distances); what is wanted are the totals over the
// lanes. Five shuffles a column would cost more than the arithmetic. Here the lanes write their
// columns to shared memory as rows and read them back as columns, 16 bytes at a time: for 32
// columns 8 stores, 8 loads and 28 additions a lane, against 31 shuffles, 31 additions and 62
// selections of a transposing butterfly, and against 160 shuffles of plain reductions. Rows are an
// odd number of 16-byte quads long, so neither direction has bank conflicts with 32 columns. The
// order of the sums is fixed: the same bits in every run.
#pragma once

#include "cuda/energy_score_types.cuh"

namespace calm {

struct alignas(16) Float4 {
  float value[4];
};

// Lanes of a group whose columns are summed together, at least, and columns, at most.
constexpr int kMinWidth = 8;
constexpr int kMaxColumns = 4 * kMinWidth;

// The lanes of one position within a warp.
struct LaneGroup {
  int width;  // a power of two
  int lane;   // within the group
  int index;  // of the group within the warp

  __device__ explicit LaneGroup(int log2_width)
      : width(1 << log2_width),
        lane(static_cast<int>(threadIdx.x & ((1u << log2_width) - 1))),
        index(static_cast<int>((threadIdx.x & 31u) >> log2_width)) {}
};

// The sum over `width` neighbouring lanes, in all of them; width may be 1. All lanes of the warp
// must come.
template <typename T>
__device__ inline T group_sum(T value, int width) {
  CALM_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    if (step < width) value += __shfl_xor_sync(kAllLanes, value, step);
  }
  return value;
}

__device__ inline float group_max(float value, int width) {
  CALM_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    if (step < width) value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, step));
  }
  return value;
}

// Columns that hold `count` sums: whole quads, a power of two of them.
CALM_HOST_DEVICE constexpr int padded_columns(int count) {
  int columns = 4;
  while (columns < count) columns *= 2;
  return columns;
}

// Quads of a row of `columns`, one more where that makes it odd.
CALM_HOST_DEVICE constexpr int staging_stride(int columns) { return (columns / 4) | 1; }

constexpr int kStagingQuads = 32 * staging_stride(kMaxColumns);

// Second half: the rows lie in `staging`, [32, staging_stride]; totals go to the group's `totals`.
template <int kColumns>
__device__ inline void sum_staged_columns(const Float4* staging, Float4* totals,
                                          const LaneGroup& group) {
  constexpr int kQuads = kColumns / 4;
  static_assert(kQuads >= 1 && kQuads <= kMinWidth && (kQuads & (kQuads - 1)) == 0);
  __syncwarp();
  // Lane (part, quad) sums kQuads of the rows; parts are added by shuffles.
  const int quad = group.lane & (kQuads - 1);
  const int parts = group.width / kQuads;
  const int part = static_cast<int>(static_cast<unsigned>(group.lane) / kQuads);
  constexpr int kStride = staging_stride(kColumns);
  const Float4* source = staging + (group.index * group.width + part) * kStride + quad;
  const int row_step = parts * kStride;
  Float4 sum = source[0];
  CALM_UNROLL
  for (int row = 1; row < kQuads; ++row) {
    const Float4 next = source[row * row_step];
    CALM_UNROLL
    for (int i = 0; i < 4; ++i) sum.value[i] += next.value[i];
  }
  CALM_UNROLL
  for (int step = kQuads; step < 32; step *= 2) {
    if (step >= group.width) break;
    CALM_UNROLL
    for (int i = 0; i < 4; ++i) sum.value[i] += __shfl_xor_sync(kAllLanes, sum.value[i], step);
  }
  if (part == 0) totals[quad] = sum;
  __syncwarp();
}

// First half: the lane's row for sums of kColumns, from its first column on.
template <int kColumns, int kCount>
__device__ inline void stage_columns(const float (&columns)[kCount], Float4* staging) {
  static_assert(kCount % 4 == 0 && kCount <= kColumns);
  Float4* row = staging + (threadIdx.x & 31u) * staging_stride(kColumns);
  CALM_UNROLL
  for (int quad = 0; quad < kCount / 4; ++quad) {
    row[quad] = Float4{
        {columns[4 * quad], columns[4 * quad + 1], columns[4 * quad + 2], columns[4 * quad + 3]}};
  }
}

template <int kColumns>
__device__ inline void sum_columns(const float (&columns)[kColumns], Float4* staging,
                                   Float4* totals, const LaneGroup& group) {
  stage_columns<kColumns>(columns, staging);
  sum_staged_columns<kColumns>(staging, totals, group);
}

// Pairs n < k in the order (0,1), (0,2), (1,2), (0,3), ...: those of the first N samples come
// first.
CALM_HOST_DEVICE constexpr int pair_index(int n, int k) { return k * (k - 1) / 2 + n; }
CALM_HOST_DEVICE constexpr int pair_of(int n, int k) {
  return n < k ? pair_index(n, k) : pair_index(k, n);
}
CALM_HOST_DEVICE constexpr int num_pairs(int n) { return n * (n - 1) / 2; }

}  // namespace calm
