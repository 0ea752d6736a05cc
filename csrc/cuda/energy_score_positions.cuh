// Four positions of a warp, as the closed form's kernel (energy_score_closed_form.cuh) divides them
// among its lanes and keeps their numbers in shared memory.
#pragma once

#include "cuda/energy_score_law.cuh"
#include "cuda/energy_score_reduce.cuh"

namespace calm {

constexpr int kWarpPositions = 4;
// While the numbers of all four are computed: one lane a sample.
constexpr int kLanesPerPosition = 32 / kWarpPositions;

// A lane owns 16 bytes of every row; the gradients of samples are made a chunk of four elements at
// a time, in which neighbouring lanes own neighbouring chunks.
template <typename In>
constexpr int kLaneElements = 16 / static_cast<int>(sizeof(In));
constexpr int kChunkElements = 4;
template <typename In>
constexpr int kChunks = kLaneElements<In> / kChunkElements;

// The numbers of a position that its lanes share.
struct PositionNumbers {
  Float4 pairs[kMaxColumns / 4];    // squared distances, then slopes; three sums of r
  Float4 moments[kMaxColumns / 4];  // a sample each
  // A sample each; on the path of energy_score_nodes.cuh two sums a node, then their strengths.
  Float4 polynomials[kMaxColumns / 4];
  Float4 diagonals[kMaxColumns / 4];  // polynomials with the slopes of the sample's pairs
  SpreadSums<float> spread;
  int64_t position;  // the last one where `exists` is 0
  float pair_score;
  int exists;
};

// A warp's positions. All of them have their numbers computed at once, kLanesPerPosition lanes
// each; their elements take rounds, `width` lanes for a position.
template <typename In>
struct WarpPositions {
  const LaneGroup group;
  const int size;
  Float4* const staging;

  __device__ WarpPositions(const EnergyArguments<In>& arguments, int log2_width, Float4* shared)
      : group(log2_width), size(static_cast<int>(arguments.shape.size)), staging(shared) {}

  // Writes down which positions these are.
  __device__ void begin(int64_t num_positions) const {
    const auto lane = static_cast<int>(threadIdx.x & 31u);
    if (lane < kWarpPositions) {
      const int64_t warp = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
      const int64_t position = warp * kWarpPositions + lane;
      numbers(lane).exists = position < num_positions;
      numbers(lane).position = position < num_positions ? position : num_positions - 1;
    }
    __syncwarp();
  }

  __device__ int rounds() const { return group.width / kLanesPerPosition; }
  // Which of the warp's positions the group has in a round.
  __device__ int slot(int round) const { return round * (32 / group.width) + group.index; }
  static __device__ bool contains(unsigned lanes, int slot) {
    return (lanes >> (kLanesPerPosition * slot) & ((1u << kLanesPerPosition) - 1)) != 0;
  }
  __device__ PositionNumbers& numbers(int slot) const {
    return reinterpret_cast<PositionNumbers*>(staging + kStagingQuads)[slot];
  }
  // The first of the lane's elements, and whether the row reaches there.
  __device__ int first_element() const { return kLaneElements<In> * group.lane; }
  __device__ bool owns() const { return first_element() < size; }
  __device__ int first_element(int chunk) const {
    return kChunkElements * (chunk * group.width + group.lane);
  }
  // The position's r = s^2 / sum s^2, four elements a quad; its means come kMeans quads on.
  static constexpr int kMeans = 32 * kChunks<In>;
  __device__ Float4* law(int round) const {
    return reinterpret_cast<Float4*>(&numbers(kWarpPositions)) + 2 * kMeans * round +
           kChunks<In> * group.width * group.index;
  }

  // All of the lane's elements of a row; zeros past its end.
  __device__ Piece<In, kLaneElements<In>> load(const Rows<In>& rows, int64_t n, int64_t p) const {
    return load_piece<In, kLaneElements<In>>(rows.row(n, p) + first_element(), owns());
  }
  __device__ void store(In* row, const float (&values)[kLaneElements<In>]) const {
    Piece<In, kLaneElements<In>> piece;
    piece.set(values);
    if (owns()) store_piece<In, kLaneElements<In>>(row + first_element(), piece);
  }
};

// Quads of shared memory that a warp needs: rows on their way to sums, the numbers of its
// positions, and their laws.
template <typename In>
CALM_HOST_DEVICE constexpr int closed_form_quads(int width) {
  return kStagingQuads +
         kWarpPositions * static_cast<int>(sizeof(PositionNumbers) / sizeof(Float4)) +
         width / kLanesPerPosition * 2 * WarpPositions<In>::kMeans;
}

}  // namespace calm
