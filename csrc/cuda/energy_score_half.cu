// The energy score's kernels for float16.

#define CALM_ENERGY_SCORE_LAUNCHER
#include "cuda/energy_score_launch.cuh"

namespace calm {

template cudaError_t launch_energy_score<Float16>(const EnergyArguments<Float16>&,
                                                  const EnergyPlan&, cudaStream_t);

}  // namespace calm
