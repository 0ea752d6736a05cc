// One binary for all x86-64 CPUs: the loader picks the widest clone that the machine runs.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(CALM_NO_MULTIVERSION)
#define CALM_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#else
#define CALM_MULTIVERSION
#endif
