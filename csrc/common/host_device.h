// Marks functions that both the host compiler and nvcc compile.
#pragma once

#ifdef __CUDACC__
#define CALM_HOST_DEVICE __host__ __device__
#else
#define CALM_HOST_DEVICE
#endif
