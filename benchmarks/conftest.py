"""Options of ``pytest benchmarks/``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("calm_kernels benchmarks")
    group.addoption("--calm-device", choices=("cpu", "cuda"), default=None)
    group.addoption("--calm-shape", choices=("small", "official"), default="official")
