"""Builds the host executor of the CUDA kernels and imports it.

``CALM_SIMT_SANITIZE`` chooses the sanitizers (default ``undefined``). With ``address`` the
sanitizer's runtime has to be the first library of the process, so `test_sanitizers.py` runs this
folder once more in a process that preloads it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = os.environ.get("CALM_SIMT_SANITIZE", "undefined")


def build(sanitize: str) -> Path:
    """Configure and build once per session and sanitizer, whichever worker comes first."""
    folder = ROOT / "build" / f"simt-{sanitize.replace(',', '-')}"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (
            [
                *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
                *("-DCALM_SIMT=ON", f"-DCALM_SANITIZE={sanitize}"),
                f"-DPython_EXECUTABLE={sys.executable}",
            ],
            ["cmake", "--build", str(folder), "--target", "calm_simt"],
        ):
            run = subprocess.run(command, capture_output=True, text=True, env=environment)
            assert run.returncode == 0, run.stdout + run.stderr
    (module,) = folder.glob("calm_simt*.so")
    return module


@pytest.fixture(scope="session")
def simt() -> ModuleType:
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.fail("tests/simt needs cmake and ninja on PATH: pip install '.[dev]'")
    spec = importlib.util.spec_from_file_location("calm_simt", build(SANITIZE))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
