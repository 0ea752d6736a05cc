"""One registry of workloads, and what measures them (extra ``bench``).

A workload (:mod:`~calm_kernels.bench.workload`) is an operation at the shapes of the paper: fresh
random inputs, the variants that compute it, an exact answer to hold each of them against, and the
fewest bytes and operations it can take. :mod:`~calm_kernels.bench.runner` checks, times and
measures one; ``calm-kernels bench`` and ``pytest benchmarks/`` are two ways to call it. A new
workload is a module of :mod:`calm_kernels.bench.workloads`.
"""
