// The energy score's kernels for float64.

#define CALM_ENERGY_SCORE_LAUNCHER
#include "cuda/energy_score_launch.cuh"

namespace calm {

template cudaError_t launch_energy_score<double>(const EnergyArguments<double>&, const EnergyPlan&,
                                                 cudaStream_t);

}  // namespace calm
