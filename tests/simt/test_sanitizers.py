"""The CUDA kernels once more under the address sanitizer, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
UNDER_ADDRESS = os.environ.get("CALM_SIMT_SANITIZE", "undefined") != "undefined"


def run_under_address_sanitizer(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The C++ runtime too: the sanitizer looks for __cxa_throw when the process starts.
    runtimes = [
        subprocess.run(
            ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "CALM_SIMT_SANITIZE": "address,undefined",
            "LD_PRELOAD": " ".join(runtimes),
            # The interpreter and torch keep what they allocate until the end.
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        },
    )


@pytest.mark.skipif(UNDER_ADDRESS, reason="already under the address sanitizer")
def test_every_kernel_passes_under_the_address_sanitizer() -> None:
    run = run_under_address_sanitizer(
        "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", str(FOLDER)
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(UNDER_ADDRESS, reason="the planted error would end this process")
def test_the_address_sanitizer_sees_a_step_past_shared_memory() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/simt'); import conftest, importlib.util as u\n"
        "spec = u.spec_from_file_location('calm_simt', conftest.build(conftest.SANITIZE))\n"
        "module = u.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "module.self_test_fault('out_of_bounds', 0)\n"
    )
    run = run_under_address_sanitizer("-c", code)
    assert run.returncode != 0
    assert "heap-buffer-overflow" in run.stderr
