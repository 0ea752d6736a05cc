// The energy score of one position: the arithmetic behind cpu/energy_score.cpp.
#pragma once

#include <cstdint>

#include "common/expected_distance.h"

namespace calm {

// Working memory of one position, owned by the caller. Rows have `padded` elements, a multiple of
// the vector length, zero past `size`. Gradients may be null; those that are not are added to.
template <typename T>
struct EnergyPosition {
  int64_t num_samples;
  int64_t size;
  int64_t padded;
  const T* samples;  // [num_samples, padded]
  const T* mean;     // [padded]
  const T* std;      // [padded]
  T* grad_samples;   // [num_samples, padded]
  T* grad_mean;      // [padded]
  T* grad_log_std;   // [padded]
  T* pair_weights;   // [num_samples, num_samples], scratch
  T* scratch;        // [4, padded]
};

// Each returns what it adds to the score. One of two types, in clones for every vector width.
float add_pair_term(const EnergyPosition<float>& position, const PowerConstants<float>& constants);
double add_pair_term(const EnergyPosition<double>& position,
                     const PowerConstants<double>& constants);

float add_closed_form_term(const EnergyPosition<float>& position,
                           const PowerConstants<float>& constants);
double add_closed_form_term(const EnergyPosition<double>& position,
                            const PowerConstants<double>& constants);

// The term of explicit targets [num_targets, padded], each with weight `weight`; grad_targets, if
// not null, is added to.
float add_target_term(const EnergyPosition<float>& position, const PowerConstants<float>& constants,
                      const float* targets, int64_t num_targets, float weight, float* grad_targets);
double add_target_term(const EnergyPosition<double>& position,
                       const PowerConstants<double>& constants, const double* targets,
                       int64_t num_targets, double weight, double* grad_targets);

// Normals of row `row`, elements [64 group, 64 (group + count)), stream kEnergyTargets.
void energy_normals(uint64_t seed, uint64_t row, int64_t group, int64_t count, float* out);
void energy_normals(uint64_t seed, uint64_t row, int64_t group, int64_t count, double* out);

}  // namespace calm
