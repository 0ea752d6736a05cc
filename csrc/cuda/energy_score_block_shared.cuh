// Shared memory and small tools of the block kernel (energy_score_block.cuh).
#pragma once

#include "cuda/energy_score_law.cuh"
#include "cuda/energy_score_reduce.cuh"

namespace calm {

constexpr int kBlockThreads = 128;
constexpr int kTile = 4;  // samples, or targets, whose rows meet in registers
// Targets worked on together: as many as fit these bytes, at most these.
constexpr int64_t kTargetBytes = 32 * 1024;
constexpr int64_t kMostTargets = 16;

// What the gradient needs of a sample's closed form.
template <typename T>
struct SampleRecord {
  SlopePolynomial<T> slopes;
  T inverse_distance;
  T share;
  int nodes;
  T strength[16];  // of the nodes
};

// Elements of the compute type T in dynamic shared memory, part after part.
struct BlockLayout {
  int64_t row;    // samples, rounded up to whole tiles: the length of a row of slopes
  int64_t batch;  // targets worked on together
  int64_t slopes;
  int64_t relative;  // closed form: r = s^2 / sum s^2
  int64_t records;
  int64_t targets;  // else: rows of targets, drawn ones without their mean
  int64_t target_slopes;
  int64_t sums;
  int64_t total;
};

template <typename T>
CALM_HOST_DEVICE inline BlockLayout block_layout(const EnergyShape& shape) {
  BlockLayout layout{};
  layout.row = (shape.num_samples + kTile - 1) / kTile * kTile;
  int64_t end = shape.num_samples * layout.row;
  if (shape.num_targets == 0) {
    layout.records = end;
    end += shape.num_samples * static_cast<int64_t>(sizeof(SampleRecord<T>) / sizeof(T));
    layout.relative = end;
    end += shape.size;
  } else {
    int64_t batch = kTargetBytes / (shape.size * static_cast<int64_t>(sizeof(T)));
    batch = batch > kMostTargets ? kMostTargets : batch;
    batch = batch > shape.num_targets ? shape.num_targets : batch;
    layout.batch = batch < 1 ? 1 : batch;
    layout.target_slopes = end;
    end += layout.batch * layout.row;
    layout.targets = end;
    end += layout.batch * shape.size;
  }
  layout.sums = end;
  layout.total = end + kBlockThreads / 32;
  return layout;
}

// The sum over the block's threads, in all of them.
template <typename T>
__device__ inline T block_sum(T value, T* sums) {
  value = group_sum(value, 32);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  T total = T(0);
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) total += sums[warp];
  return total;
}

// Squared distances of kTile rows to kTile columns, in all lanes of the group. `row` and `column`
// map (i, d) to element d of row or column i. All lanes of the warp must come.
template <typename T, typename Row, typename Column>
__device__ inline void tile_squares(const Row& row, const Column& column, int size,
                                    const LaneGroup& group, T (&squares)[kTile][kTile]) {
  CALM_UNROLL
  for (int i = 0; i < kTile; ++i) {
    CALM_UNROLL
    for (int j = 0; j < kTile; ++j) squares[i][j] = T(0);
  }
  for (int d = group.lane; d < size; d += group.width) {
    T columns[kTile];
    CALM_UNROLL
    for (int j = 0; j < kTile; ++j) columns[j] = column(j, d);
    CALM_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const T own = row(i, d);
      CALM_UNROLL
      for (int j = 0; j < kTile; ++j) {
        const T difference = own - columns[j];
        squares[i][j] += difference * difference;
      }
    }
  }
  CALM_UNROLL
  for (int i = 0; i < kTile; ++i) {
    CALM_UNROLL
    for (int j = 0; j < kTile; ++j) squares[i][j] = group_sum(squares[i][j], group.width);
  }
}

// Four normals of one Philox block, exact to the compute type's rounding.
__device__ inline void normals_of_block(const PhiloxWords& words, float (&out)[4]) {
  box_muller(words, out);
}
__device__ inline void normals_of_block(const PhiloxWords& words, double (&out)[4]) {
  for (int pair = 0; pair < 4; pair += 2) {
    const double u0 = to_uniform(words.word[pair]);
    const double u1 = to_uniform(words.word[pair + 1]);
    const double radius = sqrt(-2.0 * log(u0));
    out[pair] = radius * cos(6.283185307179586476925 * u1);
    out[pair + 1] = radius * sin(6.283185307179586476925 * u1);
  }
}

}  // namespace calm
