// Box-Muller on the four words of a Philox block, one block at a time (GPU threads, fp64 on CPUs).
#pragma once

#include <cmath>

#include "common/philox.h"

namespace calm {

// Four standard normals: words (0, 1) and (2, 3) each give (r cos, r sin).
CALM_HOST_DEVICE inline void box_muller(const PhiloxWords& words, float (&out)[4]) {
  for (int pair = 0; pair < 4; pair += 2) {
    const float radius = sqrtf(-2.0f * logf(to_uniform(words.word[pair])));
    // The angle in half turns keeps its reduction exact.
    const float half_turns = 2.0f * to_uniform(words.word[pair + 1]);
#ifdef __CUDA_ARCH__
    float sine, cosine;
    sincospif(half_turns, &sine, &cosine);
#else
    const float angle = 3.14159265358979323846f * half_turns;
    const float sine = sinf(angle);
    const float cosine = cosf(angle);
#endif
    out[pair] = radius * cosine;
    out[pair + 1] = radius * sine;
  }
}

}  // namespace calm
