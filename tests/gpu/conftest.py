"""Tests that need an NVIDIA GPU: marked ``gpu``; skipped, and counted, where torch sees none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import calm_kernels

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from operator_calls import CALLS, OperatorCall  # noqa: E402

BACKENDS = ("native", "triton", "reference")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    absent = pytest.mark.skip(reason="torch sees no GPU")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(absent)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a ``call`` runs for every operator call; with a ``backend``, on each of them."""
    if "call" in metafunc.fixturenames:
        metafunc.parametrize("call", CALLS, ids=[call.name for call in CALLS])
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def backend(request: pytest.FixtureRequest, call: OperatorCall) -> Iterator[str]:
    """Forces a backend; skips calls that it does not serve, saying why."""
    if (problem := call.why_not(request.param, "cuda")) is not None:
        pytest.skip(problem)
    with calm_kernels.backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _poisoned_memory() -> None:
    """Memory that torch hands out again holds NaN, so that what a kernel leaves out shows."""
    if torch.cuda.is_available():
        sizes = [64] * 256 + [2**10] * 256 + [2**16] * 64 + [2**22] * 8
        blocks = [torch.full((size,), torch.nan, device="cuda") for size in sizes]
        del blocks
