from __future__ import annotations

import pytest

import calm_kernels
from calm_kernels import _native

BACKENDS = ["reference"]
if _native.serves("calm_kernels::linear_cross_entropy_rows", "cpu"):
    BACKENDS.append("native")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest):
    with calm_kernels.backend(request.param):
        yield request.param
