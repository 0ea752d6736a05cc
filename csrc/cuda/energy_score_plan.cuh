// Which kernel serves a call of the energy score, and its launch geometry: plain C++, shared by the
// launcher and the host executor's tests.
#pragma once

#include <algorithm>
#include <cstddef>

#include "cuda/energy_score_block_kernel.cuh"
#include "cuda/energy_score_closed_form.cuh"
#include "cuda/energy_score_targets.cuh"

namespace calm {

enum class EnergyKernel { kClosedForm, kTargets, kBlock };

struct EnergyPlan {
  EnergyKernel kernel;
  int log2_width;  // lanes that share a position
  unsigned blocks;
  unsigned threads;
  int64_t shared_bytes;
  BlockLayout layout;
  int64_t workspace;  // elements of EnergyArguments::workspace
};

constexpr int kFastSamples = 8;
// Drawn targets of fewer dimensions take the block kernel, whose normals are exact.
constexpr int64_t kLeastDrawnSize = 16;
// Dynamic shared memory that every supported architecture grants to a block.
constexpr int64_t kMostSharedBytes = 99 * 1024;
constexpr int64_t kBlockGrid = 1 << 16;
// Blocks that share a workspace: two to four for every multiprocessor.
constexpr int64_t kWorkspaceGrid = 512;
// Below this many elements a position is the work of one warp.
constexpr int64_t kOneWarpElements = 512;

// Whether pieces of `bytes` of a row can be loaded at once.
template <typename In>
inline bool packs(const Rows<In>& rows, int64_t bytes) {
  const auto multiple = [&](int64_t elements) {
    return elements * static_cast<int64_t>(sizeof(In)) % bytes == 0;
  };
  return rows.element_stride == 1 && reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 &&
         multiple(rows.row_stride) && multiple(rows.position_stride);
}

template <typename In>
inline bool packs(const In* gradient, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(gradient) % bytes == 0;
}

// Whether rows of every tensor come in pieces of `elements` elements, 32 lanes for a row at most.
template <typename In>
inline bool packs(const EnergyArguments<In>& arguments, int64_t elements) {
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(In));
  const bool inputs = arguments.shape.num_targets == 0 || arguments.seed != nullptr
                          ? packs(arguments.mean, bytes) && packs(arguments.log_std, bytes)
                          : packs(arguments.targets, bytes);
  return inputs && packs(arguments.samples, bytes) && arguments.shape.size % elements == 0 &&
         arguments.shape.size <= 32 * elements && packs(arguments.grad_samples, bytes) &&
         packs(arguments.grad_mean, bytes) && packs(arguments.grad_log_std, bytes) &&
         packs(arguments.grad_targets, bytes);
}

inline int log2_lanes(int64_t pieces, int least) {
  int result = least;
  while ((int64_t{1} << result) < pieces && result < 5) ++result;
  return result;
}

// Calls function.template operator()<N>() for the number of samples, which the fast kernels have as
// a template argument.
template <int kSamples = 2, typename Function>
inline auto with_samples(int64_t num_samples, const Function& function) {
  if constexpr (kSamples < kFastSamples) {
    if (num_samples > kSamples) return with_samples<kSamples + 1>(num_samples, function);
  }
  return function.template operator()<kSamples>();
}

template <typename In>
inline EnergyPlan plan_energy_score(const EnergyArguments<In>& arguments, bool allow_fast) {
  const EnergyShape& shape = arguments.shape;
  EnergyPlan plan{};
  if constexpr (sizeof(In) <= sizeof(float)) {
    const bool closed_form = shape.num_targets == 0;
    const int64_t elements = closed_form ? kLaneElements<In> : kTargetElements;
    const bool exact_normals = arguments.seed != nullptr && shape.size < kLeastDrawnSize;
    if (allow_fast && shape.num_samples <= kFastSamples && packs(arguments, elements) &&
        (closed_form || !exact_normals)) {
      plan.kernel = closed_form ? EnergyKernel::kClosedForm : EnergyKernel::kTargets;
      plan.log2_width = log2_lanes(shape.size / elements, 3);
      const int warps = closed_form ? kClosedFormWarps : kTargetsWarps;
      const int width = 1 << plan.log2_width;
      const int quads = closed_form ? closed_form_quads<In>(width) : targets_quads(width);
      const int64_t positions = warps * (closed_form ? kWarpPositions : 32 / width);
      plan.blocks = static_cast<unsigned>((shape.num_positions + positions - 1) / positions);
      plan.threads = static_cast<unsigned>(32 * warps);
      plan.shared_bytes = warps * quads * static_cast<int64_t>(sizeof(Float4));
      return plan;
    }
  }
  using T = Compute<In>;
  plan.kernel = EnergyKernel::kBlock;
  plan.log2_width = log2_lanes(shape.size, 0);
  plan.threads = shape.num_samples * shape.size <= kOneWarpElements ? 32 : kBlockThreads;
  plan.layout = block_layout<T>(shape);
  plan.shared_bytes = plan.layout.total * static_cast<int64_t>(sizeof(T));
  const bool any_gradient = arguments.grad_samples != nullptr || arguments.grad_mean != nullptr ||
                            arguments.grad_log_std != nullptr;
  const bool waits =
      !std::is_same_v<In, T> && any_gradient && shape.num_targets > plan.layout.batch;
  plan.blocks =
      static_cast<unsigned>(std::min(shape.num_positions, waits ? kWorkspaceGrid : kBlockGrid));
  if (waits) plan.workspace = plan.blocks * (shape.num_samples + 2) * shape.size;
  return plan;
}

}  // namespace calm
