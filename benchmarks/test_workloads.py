"""pytest-benchmark entries: every variant of every workload, checked before it is timed.

    pytest benchmarks/ -k energy --benchmark-group-by=group
    pytest benchmarks/ --calm-shape small --calm-device cpu

Each variant is timed on its own here; ``calm-kernels bench`` interleaves them, so ratios are its.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest
import torch

from calm_kernels import backend
from calm_kernels.bench.runner import Plan, prepare_case
from calm_kernels.bench.timing import synchronize
from calm_kernels.bench.workload import Case, Variant, Workload, workloads

ROUNDS = 10


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(metafunc.config.getoption("--calm-device") or default)
    size = metafunc.config.getoption("--calm-shape")
    entries = [
        pytest.param(workload, case, variant, id=f"{workload.name}-{case.label}-{variant.name}")
        for workload in workloads().values()
        for case in workload.cases(device, size)
        for variant in workload.variants
    ]
    metafunc.parametrize(("workload", "case", "variant"), entries)


def test_variant(benchmark, workload: Workload, case: Case, variant: Variant) -> None:
    plan = Plan(case.device, variants=(variant.name,))
    prepared = prepare_case(workload, case, plan)
    row = prepared.rows[variant.name]
    if row.status in ("skipped", "error"):
        pytest.skip(row.note)
    assert row.status == "ok", row.note
    call = prepared.runnables[variant.name].call
    turns = itertools.cycle(prepared.input_sets)

    def run(inputs: object) -> None:
        call(inputs)
        synchronize(case.device)

    benchmark.group = f"{workload.name} {case.label} {case.dtype_name}"
    benchmark.extra_info.update(asdict(row))
    with backend(variant.backend):
        benchmark.pedantic(run, setup=lambda: ((next(turns),), {}), rounds=ROUNDS, warmup_rounds=2)
