"""Where compiled graphs are kept, and what the whole run says at its end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# The default is shared by all checkouts of a machine, and torch's key for a graph does not hold the
# schemas of operators: a graph of another version would be found and fail.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build/inductor"))

TRITON_RESOURCES = "triton_resources"
"""Property of a test's report: what an ahead-of-time compiled kernel uses, as JSON."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table of Triton kernels compiled in this run, whichever worker compiled them."""
    found = list(_triton_resources(terminalreporter))
    if not found:
        return
    from calm_kernels.triton import ahead_of_time

    rows = [ahead_of_time.Resources(**json.loads(text)) for text in found]
    terminalreporter.section("Triton kernels compiled ahead of time")
    terminalreporter.write(ahead_of_time.markdown(rows))


def _triton_resources(terminalreporter: pytest.TerminalReporter) -> Iterator[str]:
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()):
                if name == TRITON_RESOURCES and report.when == "call":
                    yield value
