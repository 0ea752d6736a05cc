// The energy score's kernels for bfloat16.

#define CALM_ENERGY_SCORE_LAUNCHER
#include "cuda/energy_score_launch.cuh"

namespace calm {

template cudaError_t launch_energy_score<BFloat16>(const EnergyArguments<BFloat16>&,
                                                   const EnergyPlan&, cudaStream_t);

}  // namespace calm
