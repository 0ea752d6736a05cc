"""The benchmark registry: workloads, timing, report."""
