"""A workload small enough to see through, the square of a vector, and ways to get it wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from calm_kernels.bench import checks
from calm_kernels.bench.runner import Plan
from calm_kernels.bench.timing import Budget
from calm_kernels.bench.workload import Case, Cost, Growth, Setting, Variant, Workload

CPU = torch.device("cpu")


def _variant(name: str, call: Callable[..., Any], role: Any = "ours", **fields: Any) -> Variant:
    return Variant(name, role, lambda case: call, **fields)


@pytest.fixture
def make_variant() -> Callable[..., Variant]:
    """A variant by name and function."""
    return _variant


@pytest.fixture
def make_workload() -> Callable[..., Workload]:
    """The workload with the variants given; with one that is right if none is."""

    def make(*variants: Variant, name: str = "square", size: int = 64) -> Workload:
        settings = (Setting({"P": size}, torch.float64),)
        right = _variant("plain", lambda inputs: inputs["x"] ** 2, "eager")
        return Workload(
            name=name,
            summary="x squared",
            settings={"small": settings, "cpu": settings, "cuda": settings},
            make_inputs=lambda case, state, generator: {
                "x": torch.randn(case.size("P"), generator=generator, dtype=torch.float64)
            },
            variants=variants or (right,),
            exact=lambda case, inputs: inputs["x"] * inputs["x"],
            check=lambda case, inputs, outputs, exact: checks.Check(
                checks.relative_error(outputs, exact), 1e-12, checks.RELATIVE
            ),
            cost=lambda case: Cost(16 * case.size("P"), case.size("P")),
            growth=Growth({"small": settings[0], "cpu": settings[0]}, ("P",), ("plain",)),
        )

    return make


@pytest.fixture
def plan() -> Plan:
    return Plan(CPU, size="small", budget=Budget(0.01, 3, 3, 1), seed=1)


@pytest.fixture
def make_case() -> Callable[[Workload], Case]:
    return lambda workload: workload.cases(CPU, "small")[0]
